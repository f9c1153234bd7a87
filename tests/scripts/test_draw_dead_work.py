"""The picture of dead work shows what the engine's closed forms count."""

from __future__ import annotations

from pathlib import Path

import draw_dead_work as picture
import pytest
from matplotlib.figure import Figure


def test_work_grows_with_prompts_as_the_design_says() -> None:
    work = picture.work()
    at = picture.NUM_PROMPTS.index
    concatenation, ours = work["concatenation"], work["vpt_fast"]
    assert [round(concatenation[at(m)], 1) for m in (50, 100, 200)] == [92.0, 112.5, 155.4]
    assert [round(ours[at(m)], 1) for m in (50, 100, 200)] == [67.3, 68.5, 70.9]


@pytest.mark.parametrize("cells", [picture.CONCATENATION, *picture.ENGINE.values()])
def test_each_token_has_a_square_for_each_operation_in_forward_and_backward(cells: picture.Cells) -> None:
    axes = Figure().add_subplot()
    picture.draw_cells(axes, cells, "", names=True)
    columns = [int(square.get_x()) for square in axes.patches]
    assert columns == [*range(len(picture.OPERATIONS))] * 2 * len(picture.ROWS)


def test_picture_is_a_png_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture.draw(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
