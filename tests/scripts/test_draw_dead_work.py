"""The picture of dead work shows what the engine's closed forms count."""

from __future__ import annotations

from pathlib import Path

import draw_dead_work as picture


def test_work_grows_with_prompts_as_the_design_says() -> None:
    work = picture.work()
    at = picture.NUM_PROMPTS.index
    concatenation, ours = work["concatenation"], work["vpt_fast"]
    assert [round(concatenation[at(m)], 1) for m in (50, 100, 200)] == [92.0, 112.5, 155.4]
    assert [round(ours[at(m)], 1) for m in (50, 100, 200)] == [67.3, 68.5, 70.9]


def test_every_square_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.draw(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    cells = [cell for rows in picture.ENGINE.values() for cell in rows.values()]
    assert all(len(half) == len(picture.OPERATIONS) for cell in cells for half in cell)
