"""The TensorBoard log of a run."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventLog:
    """Writes scalars to a file of TensorBoard's in `folder`. Those in its other files of epochs from
    `epochs_done` on, which are trained again, are no longer shown.

    Not torch's SummaryWriter: that writes in a thread of its own, which prints a traceback where the disk is
    full.

    Raises OSError, here and in `add`, if the file cannot be written.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=epochs_done, session_log=SessionLog(status=SessionLog.START))
        self._records.flush()

    def add(self, epoch: int, scalars: Mapping[str, float]) -> None:
        """Writes an epoch's scalars by name."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=epoch, summary=Summary(value=values))
        self._records.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what is left to write, `add` has raised it
            self._file.close()

    def _write(self, **event: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
