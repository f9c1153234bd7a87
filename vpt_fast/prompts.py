"""The settings of prompts (location, number, blocks), their initialisation and dropout.

Paper: Jia et al., Visual Prompt Tuning, ECCV 2022. Deep prompts are new in every block (eq. 6 to 7), shallow
ones enter the first block only (eq. 4 to 5). Fig. 5 compares locations, Fig. 7 the choice of blocks, Fig. 8
what the head reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn import functional as F

PROMPT_TYPES = ("deep", "shallow")
LOCATIONS = ("prepend", "key-value", "add", "add-1", "prepend-pixel", "pad", "concat-channel")
AFTER_PROMPTS = ("flow", "drop")
DROPOUT_PER = ("image", "batch")

IN_BLOCKS = ("prepend", "key-value", "add", "add-1")  # locations of deep, shared and projected prompts
IN_SEQUENCE = ("prepend", "prepend-pixel")  # locations that put prompts beside the image's tokens
IN_ATTENTION = (*IN_SEQUENCE, "key-value")  # locations whose prompts attention reads as keys and values
IN_IMAGE = ("pad", "concat-channel")  # locations whose prompts change the image's own tokens before any block

PromptShapes = tuple[tuple[int, int], ...]  # (1 or B, m) of each set of prompts that enter a model's blocks


@dataclass(frozen=True)
class PromptConfig:
    """All prompt settings of a model.

    Attributes:
        num_prompts: m: prompts per prompted block (prepend, key-value, prepend-pixel), pixels of border on
            each side (pad), extra input channels (concat-channel). ``add`` has one prompt per token and
            ``add-1`` one in all: None there, or that number.
        prompt_type: ``"deep"``: blocks get prompts of their own; ``"shallow"``: only the first block does.
        prompt_layers: (deep only) which blocks get prompts of their own: None for all, k > 0 for the first
            k, k < 0 for the last -k, or the blocks' indices from 0.
        after_prompts: what a block without prompts of its own gets if an earlier block had some:
            ``"flow"``: their outputs, as ordinary tokens (as in shallow prompting); ``"drop"``: nothing.
        prompt_location: ``"prepend"``: tokens beside the image's (the paper's choice); ``"key-value"``: keys
            and values of attention themselves, for every head (prefix tuning: Li and Liang, ACL 2021; on ViTs
            DualPrompt: Wang et al., ECCV 2022); ``"add"``: added to the tokens, one prompt for every
            position; ``"add-1"``: one prompt added to every token; ``"prepend-pixel"``: patches of pixels
            beside the image's, without position embedding; ``"pad"``: a border of pixels around the image;
            ``"concat-channel"``: extra input channels, with the whole patch embedding trained.
        prompt_shared: one set of prompts for all prompted blocks.
        prompt_project: prompts have this many dimensions, and one trained linear layer projects them to
            the model's width (key-value: to keys and values); None: no projection.
        prompt_dropout: probability that an element of a prompt is dropped in training.
        prompt_dropout_per: ``"image"``: a mask per image (the standard recipe); ``"batch"``: one for the
            whole batch, which is cheaper but a different regulariser.
    """

    num_prompts: int | None
    prompt_type: str = "deep"
    prompt_layers: int | tuple[int, ...] | None = None
    after_prompts: str = "flow"
    prompt_location: str = "prepend"
    prompt_shared: bool = False
    prompt_project: int | None = None
    prompt_dropout: float = 0.0
    prompt_dropout_per: str = "image"

    def __post_init__(self) -> None:
        layers = self.prompt_layers
        if isinstance(layers, Sequence):
            object.__setattr__(self, "prompt_layers", tuple(_index("prompt_layers", i) for i in layers))
        elif layers is not None:
            object.__setattr__(self, "prompt_layers", _index("prompt_layers", layers))
        if self.num_prompts is not None:
            object.__setattr__(self, "num_prompts", _index("num_prompts", self.num_prompts))
        if self.prompt_project is not None:
            object.__setattr__(self, "prompt_project", _index("prompt_project", self.prompt_project))

        _one_of("prompt_type", self.prompt_type, PROMPT_TYPES)
        _one_of("after_prompts", self.after_prompts, AFTER_PROMPTS)
        _one_of("prompt_location", self.prompt_location, LOCATIONS)
        _one_of("prompt_dropout_per", self.prompt_dropout_per, DROPOUT_PER)
        if not isinstance(self.prompt_shared, bool):
            raise ValueError(f"prompt_shared: got {self.prompt_shared!r}, want True or False")
        if not isinstance(self.prompt_dropout, Real) or not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout: got {self.prompt_dropout!r}, want 0 <= p < 1")
        where = f"prompt_location={self.prompt_location!r}"
        if self.prompt_location not in ("add", "add-1"):
            if self.num_prompts is None:
                raise ValueError(f"num_prompts: got None, and {where} needs it")
            if self.num_prompts < 1:
                raise ValueError(f"num_prompts: got {self.num_prompts}, want 1 or more")
        if self.prompt_project is not None and self.prompt_project < 1:
            raise ValueError(f"prompt_project: got {self.prompt_project}, want 1 or more dimensions")
        object.__setattr__(self, "prompt_dropout", float(self.prompt_dropout))  # as JSON holds it
        if self.prompt_type == "shallow":
            if self.prompt_layers is not None:
                raise ValueError(
                    f"prompt_layers: got {self.prompt_layers} with prompt_type='shallow', whose prompts "
                    "enter the first block; want prompt_type='deep'"
                )
            if self.prompt_shared:
                raise ValueError("prompt_shared: got True with prompt_type='shallow', which has one set")
        if self.prompt_location not in IN_BLOCKS:
            if self.prompt_type == "deep":
                raise ValueError(
                    f"prompt_type: got 'deep' with {where}, whose prompts are "
                    "part of the image; want 'shallow'"
                )
            if self.prompt_project is not None:
                raise ValueError(
                    f"prompt_project: got {self.prompt_project} with {where}, "
                    "whose prompts are pixels; want None"
                )
            if self.prompt_dropout:
                raise ValueError(
                    f"prompt_dropout: got {self.prompt_dropout} with {where}, "
                    "whose prompts are pixels; want 0"
                )
        if self.prompt_location not in IN_SEQUENCE and self.after_prompts != "flow":
            raise ValueError(
                f"after_prompts: got {self.after_prompts!r} with {where}, which "
                "adds no tokens that could be dropped"
            )

    @property
    def border(self) -> int:
        """Pixels of border on each side of the image."""
        return self.num_prompts if self.prompt_location == "pad" else 0

    @property
    def key_value(self) -> bool:
        """Whether prompts are keys and values, which a block neither normalises nor projects."""
        return self.prompt_location == "key-value"

    @property
    def masks_per_image(self) -> bool:
        """Whether dropout makes prompts in training that differ from image to image."""
        return self.prompt_dropout > 0.0 and self.prompt_dropout_per == "image"

    def prompted_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The indices of the blocks that get prompts of their own, in order.

        Raises:
            ValueError: prompt_layers names a block that does not exist, a block twice, or no block.
        """
        layers = self.prompt_layers
        if self.prompt_type == "shallow":
            return (0,)
        if layers is None:
            return tuple(range(num_blocks))
        if isinstance(layers, int):
            if layers == 0 or abs(layers) > num_blocks:
                raise ValueError(
                    f"prompt_layers: got {layers}, want 1 to {num_blocks} for the first blocks or "
                    f"-1 to -{num_blocks} for the last"
                )
            return tuple(range(layers)) if layers > 0 else tuple(range(num_blocks + layers, num_blocks))
        wrong = [i for i in layers if not 0 <= i < num_blocks]
        if wrong or not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"prompt_layers: got {list(layers)}, want different block indices from 0 to {num_blocks - 1}"
            )
        return tuple(sorted(layers))


def refuse_settings(keywords: dict[str, Any], what: str) -> None:
    """Removes from a constructor's keyword arguments the `PromptConfig` settings that its model does not
    support. Their default values are accepted, since the recipe passes them.

    Args:
        keywords: the keyword arguments, which are changed.
        what: names the model in the message.

    Raises:
        ValueError: a setting that is not the default; the message names it.
    """
    defaults = {field.name: field.default for field in fields(PromptConfig)}
    others = {name: keywords.pop(name) for name in defaults if name in keywords}
    given = ", ".join(f"{name}={value!r}" for name, value in others.items() if value != defaults[name])
    if given:
        raise ValueError(f"{given}: not with {what}")


def init_bound(patch_size: tuple[int, int], prompt_dim: int) -> float:
    """Bound of the uniform distribution that initialises prompts: √(6 / (3·patch area + prompt dim)).

    It is Xavier's bound for a patch embedding's weight, as in the official implementation.
    """
    return math.sqrt(6.0 / (3 * patch_size[0] * patch_size[1] + prompt_dim))


def require_shape(prompts: torch.Tensor, want: Sequence[int], name: str = "prompts") -> None:
    """Raises ValueError if a user has replaced the model's prompts by some of another shape: the rows to
    compute and read were planned for the original number."""
    if prompts.shape != tuple(want):
        raise ValueError(
            f"{name}: got shape {tuple(prompts.shape)}, want {tuple(want)}, which the model was built for"
        )


def require_tokens(config: PromptConfig) -> None:
    """Raises ValueError unless prompts are tokens of the model's width, as a block's input is."""
    if config.prompt_location != "prepend":
        raise ValueError(
            f"prompt_location: got {config.prompt_location!r}, whose prompts are no tokens; want 'prepend'"
        )
    if config.prompt_project is not None:
        raise ValueError(
            f"prompt_project: got {config.prompt_project}, and tokens have the model's width; want None"
        )


def fill_from_tokens(
    sets: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor], generator: torch.Generator | None
) -> None:
    """Fills each set of prompts (m, d) with different tokens of its block's input (B, tokens, d), chosen at
    random. Of the inputs, no more are formed than there are sets.

    Raises ValueError for an input with fewer than m tokens; all prompts are unchanged then.
    """
    found = []
    for prompts, tokens in zip(sets, inputs, strict=False):
        m, (batch_size, num_tokens, _) = len(prompts), tokens.shape
        if batch_size * num_tokens < m:
            raise ValueError(
                f"images: got {batch_size}, of {num_tokens} tokens each where they enter a block, want at "
                f"least {m} tokens, one for each prompt of the block"
            )
        chosen = torch.randperm(batch_size * num_tokens, generator=generator, device="cpu")[:m]
        found.append(tokens.flatten(0, 1)[chosen.to(tokens.device)])
    for prompts, tokens in zip(sets, found, strict=True):
        prompts.copy_(tokens)


def check_given(
    given: torch.Tensor,
    shape: Sequence[int],
    own: torch.Tensor,
    batch_size: int,
    name: str = "prompts",
) -> torch.Tensor:
    """Checks prompts that a caller passes in place of a model's own, and returns them in the dtype of these.

    Args:
        given: the same prompts for all images, of this shape, or (B, *shape) with each image's own.
        shape: wanted.
        own: the model's prompts.
        batch_size: B.
        name: of the argument, in messages.

    Raises:
        ValueError: no floating-point tensor, or one of another shape or on another device.
    """
    _require_floating(given, name)
    shape = tuple(shape)
    # By the number of dimensions first: a tracer would specialise a batch size that it compares with `sets`.
    if tuple(given.shape) != (shape if given.dim() == len(shape) else (batch_size, *shape)):
        raise ValueError(
            f"{name}: got shape {tuple(given.shape)}, want {shape} for the same prompts in all images, or "
            f"{(batch_size, *shape)} for other prompts in each image"
        )
    if given.device != own.device:
        raise ValueError(f"{name}: got a tensor on {given.device}, want {own.device}, where the model is")
    return given.to(own.dtype)


def check_given_sets(
    given: Sequence[torch.Tensor], own: torch.Tensor, batch_size: int, *, any_length: bool
) -> list[torch.Tensor]:
    """`check_given` of each set of prompts on its own. Returns tensors for `split_sets`, of one set each.

    Args:
        given: for each set (m, d), or (B, m, d) with each image's own.
        own: the model's prompts (sets, m, d).
        batch_size: B.
        any_length: whether m may be another number than the model's, and differ from set to set.

    Raises:
        ValueError: as `check_given`; another number of tensors than of sets; a tensor without prompts.
    """
    num_sets, m, width = own.shape
    require_sequence(
        given, num_sets, f"one tensor, or a sequence of {num_sets}, one for each of the model's sets"
    )
    checked = []
    for index, prompts in enumerate(given):
        name = f"prompts.{index}"
        _require_floating(prompts, name)
        length = prompts.shape[-2] if any_length and prompts.dim() >= 2 else m
        if length == 0:
            raise ValueError(f"{name}: got shape {tuple(prompts.shape)}, want 1 prompt or more")
        checked.append(check_given(prompts, (length, width), own, batch_size, name).unsqueeze(-3))
    return checked


def require_sequence(given: Any, count: int, wanted: str) -> None:
    """Raises ValueError unless the prompts that a caller passes are a sequence of `count`; `wanted` says what
    they may be."""
    if isinstance(given, torch.Tensor):
        got = "one tensor"
    elif not hasattr(given, "__len__"):
        got = type(given).__name__
    elif len(given) != count:
        got = f"{len(given)} tensors"
    else:
        return
    raise ValueError(f"prompts: got {got}, want {wanted}")


def _require_floating(given: Any, name: str) -> None:
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        what = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"{name}: got {what}, want a tensor of floating-point numbers")


def split_sets(prompts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Prompts (sets, m, d) to one tensor (1, m, d) for every set; (B, sets, m, d) to tensors (B, m, d)."""
    if prompts.requires_grad and not torch.is_grad_enabled():
        # Views would claim to require a gradient that no graph has, which breaks tools that look for one in a
        # block's arguments (FlopCounterMode). Not detached, which forward-mode tangents would not survive.
        prompts = prompts.clone()
    # unbind, not indexing: its backward is one stack, where each index would fill a full-size zero tensor
    return prompts.unbind(1) if prompts.dim() == 4 else prompts.unsqueeze(1).unbind(0)


def drop(prompts: torch.Tensor, config: PromptConfig, batch_size: int, *, training: bool) -> torch.Tensor:
    """Dropout on the prompts of one block. Applied to all blocks at once with a mask per image, the results
    would stay in memory until the last block has run.

    Args:
        prompts: (1 or B, m, d).
        config: `prompt_dropout`, the probability p of dropping an element (the others are scaled by
            1 / (1 - p)); `prompt_dropout_per`, which makes the result (B, m, d) for a mask per image.
        batch_size: B.
        training: if False, nothing is dropped.
    """
    if config.prompt_dropout == 0.0 or not training:
        return prompts
    if config.prompt_dropout_per == "image":
        prompts = prompts.expand(batch_size, -1, -1)
    elif prompts.shape[0] > 1:  # one mask for prompts that differ from image to image
        return prompts * F.dropout(torch.ones_like(prompts[:1]), config.prompt_dropout)
    return F.dropout(prompts, config.prompt_dropout)


def mask_bytes(config: PromptConfig, batch_size: int, shape: tuple[int, int], prompts: torch.Tensor) -> int:
    """Bytes that `drop` keeps for the backward pass of one block's prompts.

    Args:
        config: see `drop`.
        batch_size: B.
        shape: (m, width) of the prompts as they enter the block.
        prompts: the parameter. On a CUDA device a bool is kept per element, elsewhere a factor in its dtype.
    """
    if config.prompt_dropout == 0.0:
        return 0
    copies = batch_size if config.prompt_dropout_per == "image" else 1
    size = torch.bool.itemsize if prompts.is_cuda else prompts.itemsize
    return copies * math.prod(shape) * size


def pad_image(images: torch.Tensor, rows: torch.Tensor, sides: torch.Tensor, border: int) -> torch.Tensor:
    """Put the border prompts around each image.

    Args:
        images: (B, 3, H, W).
        rows: (1, 3, 2·border, W + 2·border), the rows above and then the rows below, pixels in [0, 1].
        sides: (1, 3, H, 2·border), the columns on the left and then those on the right.
        border: pixels on each side.

    Returns:
        (B, 3, H + 2·border, W + 2·border).
    """
    # In the prompts' dtype: that of 16-bit images would round both.
    batch = images.shape[0]
    left, right = _as_imagenet(sides).expand(batch, -1, -1, -1).split(border, dim=3)
    top, bottom = _as_imagenet(rows).expand(batch, -1, -1, -1).split(border, dim=2)
    middle = torch.cat((left, images, right), dim=3)
    return torch.cat((top, middle, bottom), dim=2)


def _as_imagenet(pixels: torch.Tensor) -> torch.Tensor:
    """Normalises pixels in [0, 1] (1, 3, H, W) like ImageNet images. Mean and deviation are Python numbers:
    copying tensors to the GPU would synchronise, which a CUDA graph does not allow."""
    channels = zip(pixels.unbind(1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def _index(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, want a whole number")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: got {value!r}, want a whole number") from None


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, choices))}")
