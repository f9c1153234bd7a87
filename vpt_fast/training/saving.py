"""When the state of a run is written to its folder."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from vpt_fast.training.run import Checkpoint, Labels, RunFolder
from vpt_fast.training.step import optimizer_tensors
from vpt_fast.tuned_model import TunedModel

SHARE = 0.05  # of the time between two saves that the first may have taken


class EpochSaver:
    """Saves the state after every epoch, or after some, where that would take more than `SHARE` of the time:
    an epoch on frozen features takes milliseconds, and its files take longer to reach the disk.

    The state after an epoch that is not saved is held in host memory, so that `close` can save it when the
    run is stopped. A killed process loses these epochs, which are trained again with the same result.
    """

    def __init__(self, folder: RunFolder, model: TunedModel, labels: Labels) -> None:
        self._folder, self._model, self._labels = folder, model, labels
        self._held: tuple[list[dict[str, Any]], Checkpoint] | None = None
        self._saved_at, self._seconds = -math.inf, 0.0  # the last save's end and duration

    def end_epoch(
        self,
        rows: list[dict[str, Any]],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        is_last: bool,
    ) -> None:
        """Called after each epoch, with the rows of all so far. Raises SavingFailed."""
        state = Checkpoint(
            epochs_done=len(rows),
            trainable=self._model.trainable_state_dict(),
            optimizer=optimizer_tensors(optimizer),
            scaler=scaler.state_dict(),
        )
        is_due = is_last or SHARE * (time.perf_counter() - self._saved_at) >= self._seconds
        # One that is due is held too, as saving it may be interrupted; no step changes it until it is saved.
        self._held = list(rows), state if is_due else state.copied()
        if is_due:
            self._save(*self._held)
            return
        with self._folder.saving(f"the metrics of epoch {len(rows)}"):
            self._folder.add_metrics(rows)

    def close(self) -> None:
        """Saves the state after the last completed epoch if it is held; the model gets it back, without the
        steps of an incomplete epoch. Raises SavingFailed."""
        if self._held is not None:
            rows, state = self._held
            self._model.load_trainable_state_dict(state.trainable)
            try:
                self._save(rows, state)
            except KeyboardInterrupt:  # the second, which ends a run at once
                self._save(rows, state)
                raise

    def _save(self, rows: list[dict[str, Any]], state: Checkpoint) -> None:
        started = time.perf_counter()
        with self._folder.saving(f"epoch {state.epochs_done}"):
            # The checkpoint comes last: if the process is killed before it, epochs are repeated with the same
            # result. Prompts saved after it could be missing for the last epoch.
            self._folder.save_prompts(self._model, self._labels)
            self._folder.save_epoch(rows, state)
        self._held = None
        self._saved_at = time.perf_counter()
        self._seconds = self._saved_at - started
