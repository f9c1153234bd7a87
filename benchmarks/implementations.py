"""The implementations in the comparison, by name, and what all of them start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import convnet_flops
import convnet_peers
import flops
import peers
import swin_flops
import swin_peers
import timm
import torch
import typer
from measure import Contender
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn
from vpt_fast.kernels import ATTENTION

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSwin, PromptedViT
from vpt_fast.backbones.creation import without_values
from vpt_fast.backbones.resolve import CONVNET, SWIN, VIT, Kind, is_supported, kind_of, resolve_backbone
from vpt_fast.engine.policy import POLICIES

NUM_CLASSES = 100

# A gradient is right when its relative error from float64 is at most this: rounding stays well below, a
# mistake does not. bfloat16 itself is near 1e-2 on prompts.
EXACT_BELOW = {"float32": 1e-4, "bfloat16": 5e-2, "amp": 5e-2}
CODES_EXACT_BELOW = 5e-2
"""The same for memory "compact", whose 8-bit codes round more than float32 does."""


@dataclass(frozen=True)
class Setting:
    """What is measured, apart from the implementation.

    dtype: "float32"; "bfloat16": frozen weights and matmuls in it, trainable tensors in float32;
    "amp": float32 weights under torch.autocast to bfloat16. Some implementations have one of their own.
    """

    model: str
    num_prompts: int
    batch_size: int
    prompt_type: str
    dtype: str
    image_size: int | None = None

    @property
    def slug(self) -> str:
        """All of it, as part of a file's name."""
        prompts, size = f"{self.num_prompts}-{self.prompt_type}-prompts", f"{self.image_size}-pixels"
        parts = [self.model, prompts, f"batch-{self.batch_size}", self.dtype, size if self.image_size else ""]
        return "-".join(filter(None, parts))


@dataclass(frozen=True)
class Family:
    """What is particular to a kind of backbone.

    Attributes:
        prompted: vpt_fast's model.
        peers: the module that holds its plain implementations.
        flops: the module that holds its closed forms of operations.
        prompt_types: those that it supports, the usual one first.
        num_prompts: the default.
        memory: vpt_fast's policies.
        lacks: implementations that do not exist for it, with the reason.
    """

    prompted: type
    peers: Any
    flops: Any
    prompt_types: tuple[str, ...] = ("deep", "shallow")
    num_prompts: int = 100
    memory: tuple[str, ...] = tuple(POLICIES)
    lacks: dict[str, str] = field(default_factory=dict)


def _no_library(reason: str) -> dict[str, str]:
    """`Family.lacks` for every FlashAttention implementation."""
    return dict.fromkeys([f"vpt_fast_{attention}" for attention in ATTENTION[1:]], reason)


def _no_vit(reason: str) -> dict[str, str]:
    """`Family.lacks` for every FlashAttention implementation, and for what only ViTs have."""
    residual = "the residual stream of a ViT alone may be in 16 bits"
    return {
        **_no_library(reason),
        "vpt_fast_bfloat16_residual": residual,
        "vpt_fast_bfloat16_residual_graphed": residual,
    }


EVA = Kind(Eva, ("timm.models.eva",), "Eva")
BEIT = Kind(Beit, ("timm.models.beit",), "Beit")
_NO_OFFICIAL_CODE = {"concat_reference": "the official code has no such backbone"}
FAMILIES = {
    VIT: Family(PromptedViT, peers, flops),
    EVA: Family(PromptedViT, peers, flops, lacks=_NO_OFFICIAL_CODE),
    BEIT: Family(
        PromptedViT,
        peers,
        flops,
        lacks={**_NO_OFFICIAL_CODE, **_no_library("it has no relative position bias")},
    ),
    SWIN: Family(PromptedSwin, swin_peers, swin_flops, lacks=_no_vit("it has no relative position bias")),
    CONVNET: Family(
        PromptedConvNet,
        convnet_peers,
        convnet_flops,
        prompt_types=("shallow",),
        num_prompts=10,
        memory=("exact",),
        lacks={
            **_no_vit("a ConvNet has no attention"),
            **dict.fromkeys(
                ("vpt_fast_torch", "vpt_fast_fused_mlp", "vpt_fast_fused_mlp_graphed"),
                "vpt_fast is plain PyTorch",
            ),
            "concat_reference": "concat_timm is what the official code does",
        },
    ),
}
"""Kind of backbone -> what is particular to it."""


def family_of(model: str | nn.Module) -> Family:
    """The family of a model, or of a timm model's name.

    Raises:
        typer.BadParameter: a name of a model of another kind.
    """
    kind = kind_of(model)
    if isinstance(model, str):
        if not is_supported(model, *FAMILIES):
            wanted = " or ".join(dict.fromkeys(kind.label for kind in (VIT, SWIN, CONVNET)))
            raise typer.BadParameter(f"models: {model} has no plain implementation here, want a {wanted}")
        module = timm.models.model_entrypoint(model).__module__
        kind = next((each for each in (EVA, BEIT) if module in each.modules), kind)
    else:
        kind = next((each for each in (EVA, BEIT) if isinstance(model, each.model)), kind)
    return FAMILIES[kind]


def require_possible(setting: Setting, names: Sequence[str], memory: Sequence[str]) -> None:
    """Raises typer.BadParameter for a prompt type, an implementation, a memory policy, an image size or a tag
    that the setting's model does not have, before any weights are made."""
    family = family_of(setting.model)
    if setting.prompt_type not in family.prompt_types:
        wanted = " or ".join(family.prompt_types)
        raise typer.BadParameter(
            f"prompt-type: got {setting.prompt_type} with {setting.model}, want {wanted}"
        )
    for name in names:
        if name in family.lacks:
            raise typer.BadParameter(
                f"implementations: got {name} with {setting.model}: {family.lacks[name]}"
            )
    for policy in memory:
        if policy not in family.memory:
            wanted = " or ".join(family.memory)
            raise typer.BadParameter(f"memory: got {policy} with {setting.model}, want {wanted}")
    with without_values():
        make_backbone(setting.model, setting.image_size)


def make_backbone(model: str, image_size: int | None) -> nn.Module:
    """timm's model with random weights, for images of this size or of its own.

    Raises:
        typer.BadParameter: timm cannot build it, or it has two heads, which read two tokens.
    """
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        backbone = resolve_backbone(model, False, size, kind=kind_of(model))[0]
    except (ValueError, RuntimeError) as error:  # the second for a tag that timm does not know
        with_size = "" if image_size is None else f" with image-size {image_size}"
        raise typer.BadParameter(f"models: got {model}{with_size}: {error}") from None
    if isinstance(backbone, VisionTransformerDistilled):
        raise typer.BadParameter(
            f"models: {model} has no plain implementation here, as it has two heads; want one with one head"
        )
    return backbone


@dataclass(frozen=True)
class Start:
    """The weights that all implementations of one setting start from, on the device."""

    backbone: nn.Module  # float32
    peer_backbone: nn.Module  # in the dtype that peers run in
    state: dict[str, Tensor]
    setting: Setting
    # vpt_fast's frozen weights by name, folded, of its first model: the others share them
    folded: dict[str, Tensor] = field(default_factory=dict)
    # vpt_fast's models by implementation, as they were built: those of other memory policies are copies
    models: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return family_of(self.backbone)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that all of them take."""
        return self.family.peers.image_size(self.backbone)

    @property
    def shape(self) -> Any:
        """What the family's closed forms read; None if there are none."""
        if getattr(self.backbone, "attn_pool", None) is not None:
            return None
        return self.family.flops.shape_of(self.backbone)

    @property
    def device(self) -> torch.device:
        return self.state["head.bias"].device

    def copy_to(self, device: torch.device) -> Start:
        """Copies of the weights on the device, which are freed together with what is made of them."""
        backbone = copy.deepcopy(self.backbone).to(device)
        is_one = self.peer_backbone is self.backbone
        peer_backbone = backbone if is_one else copy.deepcopy(self.peer_backbone).to(device)
        state = {name: tensor.to(device, copy=True) for name, tensor in self.state.items()}
        return replace(
            self, backbone=backbone, peer_backbone=peer_backbone, state=state, folded={}, models={}
        )


Build = Callable[[Any, dict[str, Tensor]], nn.Module]
Implementation = Callable[[str, Start], Contender]


def plain(role: str) -> Build:
    """The class of that name among the plain implementations for the backbone's kind."""

    def build(backbone: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        return getattr(family_of(backbone).peers, role)(backbone, state)

    return build


def peer(
    build: Build,
    *,
    compiled: str | None = None,
    graphed: bool = False,
    dtype: str | None = None,
    full_precision_weights: bool = False,
) -> Implementation:
    """A contender made of the backbone and the trainable tensors.

    Args:
        build: makes the model.
        compiled: the mode of torch.compile, or None for none.
        graphed: replay its steps from a CUDA graph, as for vpt_fast's graphed ones.
        dtype: its own, as in `Setting.dtype`, or None for the setting's.
        full_precision_weights: run under autocast where the setting's dtype is "bfloat16".
    """

    def contender(name: str, start: Start) -> Contender:
        own = dtype or start.setting.dtype
        if full_precision_weights and own == "bfloat16":
            own = "amp"
        model = build(start.peer_backbone if own == "bfloat16" else start.backbone, start.state)
        model = model.to(start.device).train()
        run = compiled_model(model, compiled)
        return Contender(name, model, run, autocast_dtype(own), graphed, compiled == "max-autotune")

    return contender


def prompted(
    backend: str = "auto",
    attention: str = "auto",
    graphed: bool = False,
    residual_dtype: torch.dtype | None = None,
    compiled: str | None = None,
) -> Implementation:
    """vpt_fast's model under the memory policy "exact"; another is assigned to the model's `memory`.

    Args:
        backend, attention, residual_dtype: of the model.
        graphed: replay its steps from a CUDA graph.
        compiled: the mode of torch.compile, one that captures CUDA graphs, or None for none.
    """

    def build(start: Start) -> nn.Module:
        setting = start.setting
        options = {} if residual_dtype is None else {"residual_dtype": residual_dtype}
        model = start.family.prompted(
            start.backbone,
            NUM_CLASSES,
            setting.num_prompts,
            setting.prompt_type,
            dtype=torch.bfloat16 if setting.dtype == "bfloat16" else None,
            backend=backend,
            attention=attention,
            **options,
        )
        model = with_folded_weights(model.to(start.device).train(), start)
        model.load_trainable_state_dict(start.state)
        return model

    def contender(name: str, start: Start) -> Contender:
        if name not in start.models:
            start.models[name] = build(start)
        model = twin(start.models[name])
        run, captures = compiled_model(model, compiled), compiled is not None
        return Contender(name, model, run, autocast_dtype(start.setting.dtype), graphed, captures)

    return contender


def compiled_model(model: nn.Module, mode: str | None) -> Callable[..., Any]:
    """The model under torch.compile in this mode; the model itself for None."""
    if mode is None:
        return model
    # Static shapes, since all batches of a setting have one size. One graph, so that a graph break, or a
    # recompilation too many, is an error and not a slow row.
    return torch.compile(model, dynamic=False, fullgraph=True, mode=mode)


def twin(model: nn.Module) -> Any:
    """A copy of the model that shares its frozen weights."""
    frozen = {id(tensor): tensor for tensor in model.parameters() if not tensor.requires_grad}
    return copy.deepcopy(model, frozen)


def linear_probe(name: str, start: Start) -> Contender:
    """vpt_fast.LinearProbe."""
    setting = start.setting
    dtype = torch.bfloat16 if setting.dtype == "bfloat16" else None
    model = LinearProbe(start.backbone, NUM_CLASSES, dtype=dtype).to(start.device).train()
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


DEFINITION = plain("ConcatTimm")
"""What the gradients of every implementation but the bounds are compared with, in float64."""

IMPLEMENTATIONS: dict[str, Implementation] = {
    "vpt_fast": prompted(),
    "vpt_fast_graphed": prompted(graphed=True),
    "vpt_fast_bfloat16_residual": prompted(residual_dtype=torch.bfloat16),
    "vpt_fast_bfloat16_residual_graphed": prompted(residual_dtype=torch.bfloat16, graphed=True),
    "vpt_fast_fused_mlp": prompted(backend="triton_fused_mlp"),
    "vpt_fast_fused_mlp_graphed": prompted(backend="triton_fused_mlp", graphed=True),
    # one line of PyTorch's against launch overhead, for those who keep their training loop
    "vpt_fast_reduce_overhead": prompted(compiled="reduce-overhead"),
    "vpt_fast_torch": prompted(backend="torch"),
    **{f"vpt_fast_{attention}": prompted(attention=attention) for attention in ATTENTION[1:]},
    "concat_reference": peer(plain("ConcatReference"), dtype="float32"),  # as the official code runs
    "concat_timm": peer(DEFINITION),
    "concat_timm_compiled": peer(DEFINITION, compiled="default"),
    # its launches cost as little as those of vpt_fast_graphed
    "concat_timm_compiled_graphed": peer(DEFINITION, compiled="default", graphed=True),
    "concat_timm_max_autotune": peer(DEFINITION, compiled="max-autotune"),
    "concat_timm_checkpointed": peer(plain("ConcatCheckpointed")),
    "concat_timm_amp": peer(DEFINITION, dtype="amp"),
    "concat_timm_amp_compiled": peer(DEFINITION, dtype="amp", compiled="default"),
    "no_prompts": peer(plain("NoPrompts")),
    "linear_probe": linear_probe,
    # weights that are trained need more digits than bfloat16 has
    "full_finetuning": peer(peers.FullFineTuning, full_precision_weights=True),
}


def require_built(name: str, start: Start) -> Contender:
    """The contender of that name; typer.BadParameter if it lacks a library or a GPU to run here."""
    try:
        contender = IMPLEMENTATIONS[name](name, start)
    except ValueError as error:
        raise typer.BadParameter(f"implementations: got {name}: {error}") from None
    if contender.graphed and start.device.type != "cuda":
        raise typer.BadParameter(
            f"implementations: got {name} on {start.device}, want a GPU, which has graphs"
        )
    return contender


# Defaults. On a CPU "auto" is "torch", and there are no graphs. On a GPU max-autotune, which compiles for
# minutes, is left out, and of others' FlashAttention only PyTorch's own is always there.
ON_A_GPU = [
    "vpt_fast",
    "vpt_fast_graphed",
    "vpt_fast_bfloat16_residual",
    "vpt_fast_bfloat16_residual_graphed",
    "vpt_fast_fused_mlp_graphed",
    "vpt_fast_torch",
    "vpt_fast_sdpa_flash",
    "concat_reference",
    "concat_timm",
    "concat_timm_compiled",
    "concat_timm_compiled_graphed",
    "concat_timm_checkpointed",
    "concat_timm_amp",
    "concat_timm_amp_compiled",
    "no_prompts",
    "linear_probe",
    "full_finetuning",
]
ON_A_CPU = ["vpt_fast", "concat_reference", "concat_timm", "concat_timm_compiled", "no_prompts"]

# Other computations: references for the other rows, not ways to tune prompts. Each with its definition.
BOUNDS: dict[str, Build] = {
    "no_prompts": plain("NoPrompts"),
    "linear_probe": peers.LinearProbe,
    "full_finetuning": peers.FullFineTuning,
}


def make_start(setting: Setting, device: torch.device) -> Start:
    torch.manual_seed(0)
    backbone = make_backbone(setting.model, setting.image_size)
    backbone.eval().requires_grad_(False).to(device)
    arguments = setting.num_prompts, setting.prompt_type, NUM_CLASSES
    state = family_of(setting.model).peers.initial_state(backbone, *arguments)
    peer_backbone = backbone
    if setting.dtype == "bfloat16":
        peer_backbone = copy.deepcopy(backbone).to(torch.bfloat16)
        if isinstance(backbone, Eva):  # rounded frequencies would give wrong angles
            peer_backbone.rope = backbone.rope
    state = {name: tensor.to(device) for name, tensor in state.items()}
    return Start(backbone, peer_backbone, state, setting)


def random_batch(start: Start, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) of the size that the start's backbone takes, and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, *start.image_size, generator=generator)
    return images.to(device), torch.randint(NUM_CLASSES, (batch_size,), generator=generator).to(device)
