"""Saved models in repositories of the Hugging Face hub: reading them, and the model card of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from vpt_fast.backbones.resolve import Origin, hub_repository
from vpt_fast.backbones.sources import local_folder, said_by_hub
from vpt_fast.counting import counted

CARD_FILE = "README.md"


def download_saved(name: str, files: Sequence[str]) -> Path:
    """A local folder with these files of a repository, downloaded unless they are cached.

    Args:
        name: owner/name, or owner/name@revision with a branch, tag or commit.
        files: those of them that the repository has.

    Raises:
        FileNotFoundError: there is no such repository or revision, or the hub cannot be reached.
    """
    repo_id, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision or None, allow_patterns=list(files)
        )
    except (EntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name}: is no folder, and cannot be read from the Hugging Face hub: {said_by_hub(error)}; "
            "want a folder that save_pretrained wrote, or owner/name or owner/name@revision of a repository"
        ) from error
    return Path(folder)


def model_card(
    repo_id: str,
    model: str,
    backbone: Origin,
    num_classes: int,
    *,
    task: str,
    stores_backbone: bool,
    call: str | None,
) -> str:
    """README.md of a new repository: what the hub lists it under, what it is, and how to load it.

    Args:
        model: the class's name.
        task: the hub's name for it, such as image-classification.
        stores_backbone: whether the file holds the backbone's weights too.
        call: `ClassifierConfig.backbone_call`.
    """
    base_model = hub_repository(backbone)
    metadata = huggingface_hub.ModelCardData(
        library_name="vpt_fast", pipeline_tag=task, tags=["visual-prompt-tuning"], base_model=base_model
    )
    link = f"[{base_model}](https://huggingface.co/{base_model})"
    of = link if base_model else backbone.name or "a backbone that was built in Python"
    held = "All weights are here." if stores_backbone else "The backbone's own weights are not here."
    argument = ""
    if backbone.name is None or local_folder(backbone.name) or call is not None:
        argument = ", backbone=..."
    elif backbone.checkpoint is not None and not stores_backbone:
        argument = ", checkpoint=..."
    return f"""---
{metadata.to_yaml()}
---

# {repo_id}

A `{model}` of vpt_fast for {counted(num_classes, "class", "classes")}, on {of}. {held}

```python
import vpt_fast

model = vpt_fast.load_pretrained("{repo_id}"{argument})
```
"""
