"""The implementations in the comparison, by name, and what all of them start from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import peers
import timm
import torch
import typer
from measure import Contender
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from vpt_fast.kernels import ATTENTION

from vpt_fast import LinearProbe, PromptedViT

NUM_CLASSES = 100

# A gradient is right when its relative error from float64 is at most this: rounding stays well below, a
# mistake does not. bfloat16 itself is near 1e-2 on prompts.
EXACT_BELOW = {"float32": 1e-4, "bfloat16": 5e-2, "amp": 5e-2}


@dataclass(frozen=True)
class Setting:
    """What is measured, other than by which implementation.

    dtype: "float32"; "bfloat16": frozen weights and matrix products in it, trainable tensors in float32;
    "amp": float32 weights under torch.autocast to bfloat16. Some implementations have one of their own.
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
    # vpt_fast's frozen weights by name, folded, of its first model: the others share them
    folded: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.state["prompts"].device

    def copy_to(self, device: torch.device) -> Start:
        """Copies of the weights on the device, which live no longer than what is made of them."""
        vit = copy.deepcopy(self.vit).to(device)
        peer_vit = vit if self.peer_vit is self.vit else copy.deepcopy(self.peer_vit).to(device)
        state = {name: tensor.to(device, copy=True) for name, tensor in self.state.items()}
        return replace(self, vit=vit, peer_vit=peer_vit, state=state, folded={})


Build = Callable[[VisionTransformer, dict[str, Tensor]], nn.Module]
Implementation = Callable[[str, Start], Contender]


def peer(
    build: Build,
    *,
    compiled: str | None = None,
    dtype: str | None = None,
    full_precision_weights: bool = False,
) -> Implementation:
    """A contender made of the ViT and the trainable tensors.

    Args:
        build: makes the model.
        compiled: the mode of torch.compile, or None for none.
        dtype: its own, as in `Setting.dtype`, or None for the setting's.
        full_precision_weights: run under autocast where the setting's dtype is "bfloat16".
    """

    def contender(name: str, start: Start) -> Contender:
        own = dtype or start.setting.dtype
        if full_precision_weights and own == "bfloat16":
            own = "amp"
        model = build(start.peer_vit if own == "bfloat16" else start.vit, start.state)
        model = model.to(start.device).train()
        run: Any = model
        if compiled is not None:
            # Of static shapes, since all batches of a setting have one size. In one graph: a part that could
            # not be compiled, or once too often, is an error and not a slow row.
            run = torch.compile(model, dynamic=False, fullgraph=True, mode=compiled)
        return Contender(name, model, run, autocast_dtype(own), captures=compiled == "max-autotune")

    return contender


def prompted(backend: str = "auto", attention: str = "auto", graphed: bool = False) -> Implementation:
    """vpt_fast.PromptedViT under the memory policy "exact"; another is assigned to the model's `memory`."""

    def contender(name: str, start: Start) -> Contender:
        setting = start.setting
        model = PromptedViT(
            start.vit,
            NUM_CLASSES,
            setting.num_prompts,
            setting.prompt_type,
            dtype=torch.bfloat16 if setting.dtype == "bfloat16" else None,
            backend=backend,
            attention=attention,
        )
        model = with_folded_weights(model.to(start.device).train(), start)
        model.load_trainable_state_dict(start.state)
        return Contender(name, model, model, autocast_dtype(setting.dtype), graphed)

    return contender


def linear_probe(name: str, start: Start) -> Contender:
    """vpt_fast.LinearProbe."""
    setting = start.setting
    dtype = torch.bfloat16 if setting.dtype == "bfloat16" else None
    model = LinearProbe(start.vit, NUM_CLASSES, dtype=dtype).to(start.device).train()
    model.load_trainable_state_dict({key: start.state[key] for key in ("head.weight", "head.bias")})
    return Contender(name, with_folded_weights(model, start), model, autocast_dtype(setting.dtype))


def autocast_dtype(dtype: str) -> torch.dtype | None:
    """What torch.autocast is given for a `Setting.dtype`, None for no autocast."""
    return torch.bfloat16 if dtype == "amp" else None


def with_folded_weights(model: Any, start: Start) -> Any:
    """The model with frozen weights that all of vpt_fast's models of this start share: they are equal."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = start.folded.setdefault(name, parameter.data)
    return model


IMPLEMENTATIONS: dict[str, Implementation] = {
    "vpt_fast": prompted(),
    "vpt_fast_graphed": prompted(graphed=True),
    "vpt_fast_torch": prompted(backend="torch"),
    **{f"vpt_fast_{attention}": prompted(attention=attention) for attention in ATTENTION[1:]},
    "concat_reference": peer(peers.ConcatReference, dtype="float32"),  # as the official code runs
    "concat_timm": peer(peers.ConcatTimm),
    "concat_timm_compiled": peer(peers.ConcatTimm, compiled="default"),
    "concat_timm_max_autotune": peer(peers.ConcatTimm, compiled="max-autotune"),
    "concat_timm_checkpointed": peer(peers.ConcatCheckpointed),
    "concat_timm_amp": peer(peers.ConcatTimm, dtype="amp"),
    "concat_timm_amp_compiled": peer(peers.ConcatTimm, dtype="amp", compiled="default"),
    "no_prompts": peer(peers.NoPrompts),
    "linear_probe": linear_probe,
    # weights that are trained need more digits than bfloat16 has
    "full_finetuning": peer(peers.FullFineTuning, full_precision_weights=True),
}
# Where nothing else is asked for. On a CPU "torch" is what "auto" stands for, and there is no graph; on a GPU
# max-autotune compiles for minutes, and of the FlashAttention of others PyTorch's own is always there.
ON_A_GPU = [
    "vpt_fast",
    "vpt_fast_graphed",
    "vpt_fast_torch",
    "vpt_fast_sdpa_flash",
    "concat_reference",
    "concat_timm",
    "concat_timm_compiled",
    "concat_timm_checkpointed",
    "concat_timm_amp",
    "concat_timm_amp_compiled",
    "no_prompts",
    "linear_probe",
    "full_finetuning",
]
ON_A_CPU = ["vpt_fast", "concat_reference", "concat_timm", "concat_timm_compiled", "no_prompts"]

# Another computation: rows to read the others by, not ways to tune prompts. Each with what defines it.
BOUNDS: dict[str, Build] = {
    "no_prompts": peers.NoPrompts,
    "linear_probe": peers.LinearProbe,
    "full_finetuning": peers.FullFineTuning,
}


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
