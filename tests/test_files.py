"""Files that are written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpt_fast.files import parse_json, read_json, remove_unfinished, replacing, unfinished, write_json


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_interruption_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("name", "error"), [("folder", IsADirectoryError), ("none/a", FileNotFoundError)])
def test_place_that_no_file_can_be_written_to_is_named(tmp_path: Path, name: str, error: type) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=f"'{tmp_path / name}'"), replacing(tmp_path / name):
        pytest.fail("got a temporary file")


def test_files_of_a_killed_process_are_removed_and_those_being_written_stay(tmp_path: Path) -> None:
    left = tmp_path / ".a.txt.abcd_123.txt"
    left.touch()
    with replacing(tmp_path / "a.txt") as temporary:
        remove_unfinished(tmp_path / "a.txt")
        assert temporary.exists() and not left.exists()


def test_files_of_a_killed_process_are_known_by_the_names_that_they_were_to_have(
    tmp_path: Path,
) -> None:
    names = ("a", "a.abcd_123", "a.txt", "new\nline.txt")
    left = [f".{name}.12345678{Path(name).suffix}" for name in names]
    for name in (
        *left,
        ".b.txt.12345678.txt",
        ".a.txt.12345678",
        ".a.txt.1234567.txt",
        "a.txt.12345678.txt",
    ):
        (tmp_path / name).touch()
    assert unfinished(*map(tmp_path.joinpath, names)) == sorted(map(tmp_path.joinpath, left))
    assert unfinished(tmp_path / "a.txt") == [tmp_path / ".a.txt.12345678.txt"]
    assert unfinished(tmp_path / "nowhere" / "a.txt") == []


def test_file_is_readable_by_others_as_any_new_file_is(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    (tmp_path / "b.txt").write_text("plain")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_brackets_without_end_are_no_json() -> None:
    with pytest.raises(ValueError, match="lie within each other"):
        parse_json("[" * 100_000)


def test_json_files_show_names_as_they_are_and_keep_those_that_are_not_utf8(tmp_path: Path) -> None:
    values = {"classes": ["café", "猫"], "checkpoint": b"caf\xe9.pth".decode(errors="surrogateescape")}
    write_json(tmp_path / "labels.json", values)
    text = (tmp_path / "labels.json").read_text(encoding="utf-8")
    assert "café" in text and "猫" in text and r"caf\udce9.pth" in text
    assert read_json(tmp_path / "labels.json") == values
