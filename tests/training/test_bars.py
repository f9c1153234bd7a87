"""What is shown while shards are listed."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from task_trees import write_shards

from vpt_fast.data.splits import open_splits
from vpt_fast.training import bars


def shown(root: Path, *, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=200)
    with bars.listing_shards(console) as on_shards:
        open_splits(root, on_shards=on_shards)
    return console.file.getvalue()


def test_shards_are_listed_with_a_bar_on_a_terminal(tmp_path):
    assert "listing shards" in shown(write_shards(tmp_path, {"train": 8}), is_terminal=True)


def test_a_log_says_first_that_many_gigabytes_are_listed(tmp_path, monkeypatch):
    root = write_shards(tmp_path, {"train": 8})
    assert shown(root, is_terminal=False) == ""
    monkeypatch.setattr(bars, "MANY_BYTES", 1000)
    assert "Listing the images in shards of " in shown(root, is_terminal=False)


def test_folders_of_images_have_no_bar_of_shards(images):
    assert shown(images, is_terminal=True) == ""
