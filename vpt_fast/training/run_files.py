"""The run folder: the files that a training run writes and resumes from.

    config.yaml              the resolved recipe
    run.json                 versions, device, backbone, data
    metrics.jsonl            one line per epoch
    results.json             scores and loss on val and test after the last epoch
    curves.png
    prompts/                 what the method trains, such as prompts and head (save_pretrained), class names
                             and preprocessing: with the backbone, all that inference needs
    checkpoint.safetensors   the same and the optimizer after the last epoch that was saved
    tensorboard/             if tensorboard is installed

`run` writes and reads them; here are their names alone, which need no torch.
"""

from __future__ import annotations

from pathlib import Path

LABELS_FILE = "labels.json"  # in the prompts folder


class RunFiles:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.facts = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.curves = path / "curves.png"
        self.prompts = path / "prompts"
        self.checkpoint = path / "checkpoint.safetensors"
        self.tensorboard = path / "tensorboard"

    @property
    def is_of_run(self) -> bool:
        """Whether there is a run or, where its prompts folder is named, a file of it."""
        places = (self.config, self.prompts, self.path / LABELS_FILE)
        return any(place.exists() for place in places)
