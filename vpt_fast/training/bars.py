"""Progress bars of long steps. Commands that need no torch import these alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

MANY_BYTES = 10**9  # of shards, whose headers take seconds to read

Advance = Callable[[int], None]  # called with a number of images, or bytes, whenever these are done


@contextlib.contextmanager
def progress_bar(
    console: Console, what: str, total: int, count: ProgressColumn | None = None
) -> Iterator[Advance]:
    """A bar for `total` images, or for what the column `count` shows, on a terminal."""
    with Bars(
        TextColumn(what),
        BarColumn(),
        count or MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task("", total=total)
        yield lambda count: bars.advance(task, count)


@contextlib.contextmanager
def listing_shards(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar while shards are listed, if any are: yields the `on_shards` of `open_splits`."""
    with contextlib.ExitStack() as stack:
        advance: Advance | None = None

        def count(done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                if total >= MANY_BYTES and not console.is_terminal:  # there is no bar
                    text = f"Listing the images in shards of {filesize.decimal(total)}: all headers are read."
                    console.print(text, highlight=False)
                advance = stack.enter_context(
                    progress_bar(console, "listing shards", total, DownloadColumn())
                )
            advance(done)

        yield count
