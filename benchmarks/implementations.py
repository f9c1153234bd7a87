"""The implementations in the comparison, by name, and what all of them start from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import timm
import torch
import typer
from measure import Contender
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpt_fast import PromptedViT

NUM_CLASSES = 100

# A gradient is right when its relative error from float64 is at most this: rounding stays well below, a
# mistake does not. bfloat16 itself is near 1e-2 on prompts.
EXACT_BELOW = {"float32": 1e-4, "bfloat16": 5e-2, "amp": 5e-2}


@dataclass(frozen=True)
class Setting:
    """What is measured, other than by which implementation.

    dtype: "float32"; "bfloat16": frozen weights and matrix products in it, trainable tensors in float32;
    "amp": float32 weights under torch.autocast to bfloat16.
    """

    model: str
    num_prompts: int
    batch_size: int
    prompt_type: str
    dtype: str
    image_size: int | None = None


@dataclass(frozen=True)
class Start:
    """The weights that all implementations of one setting start from, on the device."""

    vit: VisionTransformer  # float32
    peer_vit: VisionTransformer  # in the dtype that peers run in
    state: dict[str, Tensor]
    setting: Setting


def peer(build: Callable[[VisionTransformer, dict[str, Tensor]], nn.Module], compiled: bool = False) -> Any:
    def contender(name: str, start: Start) -> Contender:
        model = build(start.peer_vit, start.state).to(start.state["prompts"].device).train()
        # Static shapes: the small batch of the gradient check must not turn the timed one into a dynamic one.
        run = torch.compile(model, dynamic=False) if compiled else model
        return Contender(name, model, run, torch.bfloat16 if start.setting.dtype == "amp" else None)

    return contender


def prompted(
    memory: str = "exact", backend: str = "auto", attention: str = "auto", graphed: bool = False
) -> Any:
    def contender(name: str, start: Start) -> Contender:
        setting = start.setting
        model = PromptedViT(
            start.vit,
            NUM_CLASSES,
            setting.num_prompts,
            setting.prompt_type,
            dtype=torch.bfloat16 if setting.dtype == "bfloat16" else None,
            memory=memory,
            backend=backend,
            attention=attention,
        )
        model = model.to(start.state["prompts"].device).train()
        model.load_trainable_state_dict(start.state)
        autocast = torch.bfloat16 if setting.dtype == "amp" else None
        return Contender(name, model, model, autocast, graphed)

    return contender


IMPLEMENTATIONS: dict[str, Callable[[str, Start], Contender]] = {
    "vpt_fast": prompted(),
    "vpt_fast_graphed": prompted(graphed=True),
    "vpt_fast_compact": prompted("compact"),
    "vpt_fast_recompute_mlp": prompted("recompute_mlp"),
    "vpt_fast_recompute": prompted("recompute"),
    "vpt_fast_sdpa_flash": prompted(attention="sdpa_flash"),
    "vpt_fast_torch": prompted(backend="torch"),
    "concat_reference": peer(peers.ConcatReference),
    "concat_timm": peer(peers.ConcatTimm),
    "concat_timm_compiled": peer(peers.ConcatTimm, compiled=True),
    "no_prompts": peer(peers.NoPrompts),
}
# Where nothing else is asked for. On a CPU "torch" is what "auto" stands for, and there is no graph.
ON_A_GPU = [name for name in IMPLEMENTATIONS if name != "vpt_fast_torch"]
ON_A_CPU = ["vpt_fast", "concat_reference", "concat_timm", "concat_timm_compiled", "no_prompts"]
BOUNDS = ("no_prompts",)  # another computation: a row to read the others by, not a way to tune prompts


def make_start(setting: Setting, device: torch.device) -> Start:
    torch.manual_seed(0)
    size: dict[str, Any] = {} if setting.image_size is None else {"img_size": setting.image_size}
    vit = timm.create_model(setting.model, pretrained=False, num_classes=0, **size)
    if not isinstance(vit, VisionTransformer):
        raise typer.BadParameter(
            f"models: {setting.model} is a {type(vit).__name__}, want a VisionTransformer"
        )
    vit.eval().requires_grad_(False).to(device)
    state = peers.initial_state(vit, setting.num_prompts, setting.prompt_type, NUM_CLASSES)
    peer_vit = copy.deepcopy(vit).to(torch.bfloat16) if setting.dtype == "bfloat16" else vit
    return Start(vit, peer_vit, {name: tensor.to(device) for name, tensor in state.items()}, setting)


def random_batch(vit: VisionTransformer, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *vit.patch_embed.img_size, generator=generator)
    return images.to(device), torch.randint(NUM_CLASSES, (batch_size,), generator=generator).to(device)
