"""Base classes of classifiers: with a linear head, with frozen blocks on the engine, with a memory policy."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast.backbones.layers import dtype_of
from vpt_fast.backbones.resolve import CONVNET, Origin
from vpt_fast.backbones.timm_convnet import FrozenConvNet
from vpt_fast.backbones.timm_swin import FrozenSwin
from vpt_fast.backbones.timm_vit import POOLS, FrozenViT
from vpt_fast.backbones.timm_whole import WholeBackbone, pooling_of
from vpt_fast.backbones.vit import TimmViT, frozen_vit
from vpt_fast.engine import cost
from vpt_fast.engine.contexts import compute_dtype
from vpt_fast.engine.plan import Read, row_range
from vpt_fast.engine.policy import POLICIES, MemoryPolicy, check_memory, choose_policy
from vpt_fast.free_memory import free_bytes
from vpt_fast.kernels import get_backend
from vpt_fast.prompts import PromptShapes
from vpt_fast.saved_model import BackboneConfig
from vpt_fast.tuned_model import TunedModel, check_count, check_dtype

# Initial bias of the head: its sigmoid is 1/100 for every class, as in the official code.
_HEAD_BIAS = -math.log(99.0)


def is_rising(blocks: Any, num_blocks: int) -> bool:
    """Whether these are ascending indices, as plain ints, of a model's blocks."""
    if not isinstance(blocks, Sequence) or not all(type(index) is int for index in blocks):
        return False
    return list(blocks) == sorted({*blocks} & {*range(num_blocks)})


def check_arguments(
    num_classes: int,
    pool: str | None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    attention: str = "auto",
) -> None:
    """Checks arguments before a backbone is built or downloaded.

    Raises:
        ValueError: an argument out of range or not supported; the message names it.
    """
    check_count("num_classes", num_classes)
    if pool not in (None, *POOLS):
        raise ValueError(f"pool: got {pool!r}, want None or one of {', '.join(map(repr, POOLS))}")
    if dtype is not None:
        check_dtype(dtype, " or None")
    get_backend(backend, attention)


class TunedClassifier(TunedModel):
    """A backbone with a linear head. Subclasses define what is trained besides the head, and how the logits
    are computed.

    Args:
        backbone: frozen; a subclass unfreezes what it trains.
        origin: where the backbone came from.
        num_classes: outputs of the head.
        pool: what the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
    """

    undecayed = ("head.bias",)

    def __init__(
        self,
        backbone: FrozenViT | FrozenSwin | FrozenConvNet | WholeBackbone,
        origin: Origin,
        num_classes: int,
        *,
        pool: str | None,
    ) -> None:
        super().__init__(
            BackboneConfig(
                **asdict(origin), fingerprint=backbone.fingerprint, architecture=backbone.architecture
            )
        )
        self.backbone = backbone  # type: ignore[assignment]
        self.pool = pool
        self.num_classes = check_count("num_classes", num_classes)
        self.head = nn.Linear(self.num_features, self.num_classes, device=backbone.device)
        _start_head(self.head)

    @property
    def num_features(self) -> int:
        """The width of the head's input, under timm's name: d, or 2 d for the two tokens of DeiT's distilled
        models."""
        if isinstance(self.backbone, FrozenViT):
            return self.backbone.num_features(self.pool)
        return self.embed_dim

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a newly initialised one; prompts and everything else that is trained are kept.
        For features without a head, call `image_features`.

        Args:
            num_classes: outputs of the new head.
            global_pool: None, or the model's own pooling: `pool`, or if that is None timm's name. It cannot
                be changed, since the model was built to compute only the rows that it reads.

        Raises:
            ValueError: num_classes is not a whole number of at least 1, or another pooling.
        """
        num_classes = check_count("num_classes", num_classes)
        pool = pooling_of(self.backbone.stem) if self.pool is None else self.pool
        if global_pool not in (None, pool):
            raise ValueError(
                f"global_pool: got {global_pool!r}, want None or the model's own {pool!r}; another one "
                "is the argument pool, when the model is built"
            )
        dtype = self._feature_dtype
        self.head = nn.Linear(self.num_features, num_classes, device=self.backbone.device, dtype=dtype)
        _start_head(self.head)
        self.num_classes = num_classes

    @property
    def _feature_dtype(self) -> torch.dtype:
        """dtype of the head's input: that of its weights, or the backbone's, at least float32, if it has
        none."""
        backbone = dtype_of(self.backbone, default=torch.float32)
        return dtype_of(self.head, default=torch.promote_types(backbone, torch.float32))

    def _require_storable_head(self) -> None:
        found = {name: tuple(weight.shape) for name, weight in self.head.named_parameters()}
        wanted = {"weight": (self.num_classes, self.num_features), "bias": (self.num_classes,)}
        if found != wanted:
            raise ValueError(
                f"head: got a {type(self.head).__name__} with {found or 'no weights'}, which from_pretrained "
                f"does not build again; want nn.Linear({self.num_features}, {self.num_classes}), as "
                "reset_classifier makes it, or else to save model.trainable_state_dict() yourself"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to logits (B, num_classes).

        Raises:
            ValueError: images of the wrong shape.
        """
        return self.head(self.image_features(images))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the head's input (B, `num_features`), in its dtype: one vector
        per image, for image retrieval, say, or another classifier.

        Raises:
            ValueError: images of the wrong shape.
        """
        raise NotImplementedError

    def _features(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that pooling reads, after the last block (B, R, d), to the head's input
        (B, `num_features`)."""
        return self.backbone.features(rows, self.pool).to(self._feature_dtype)

    def _features_of_tokens(self, tokens: torch.Tensor, reads: Read) -> torch.Tensor:
        """All tokens after the last block (B, N, d) to the head's input (B, `num_features`)."""
        rows = row_range(reads, tokens.shape[1], self.backbone.num_prefix_tokens, 0)
        # A copy: the final norm keeps its input, and a view would keep the unread rows alive too.
        return self._features(tokens[:, slice(*rows)].contiguous())

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Shape of one image's `frozen_features` at the model's own image size; None if the model has none,
        because its trained part needs the images."""
        return None

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the input of the trained part (B, *feature_shape), not rounded.
        It is the same in every epoch, so it may be computed once and cached. It requires a gradient if the
        images do, or if a user has unfrozen parameters before it."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen features")

    @property
    def features_config(self) -> dict[str, Any]:
        """All that `frozen_features` may depend on besides the images and autocast, as JSON holds it."""
        return self.config.to_dict()

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The trained part: `frozen_features` to logits (B, num_classes)."""
        raise NotImplementedError(f"{type(self).__name__} has no frozen features")

    def patch_tokens(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Normalised images (B, C, H, W) to the patch tokens after the given blocks, before the final norm.

        Gradients flow through all of them to whatever is trained besides the head. Prefix tokens and prompts
        are left out, and so is the work for them in the last given block; no later block runs.

        Args:
            images: as for `forward`.
            blocks: indices from 0, in ascending order.

        Returns:
            (B, patches, d) for each block, in the residual stream's dtype; patches in row-major order.

        Raises:
            ValueError: images of the wrong shape, or no such blocks.
            NotImplementedError: the class has no patch tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no patch tokens")

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        if not is_rising(blocks, self.num_blocks) or not blocks:
            raise ValueError(
                f"blocks: got {blocks!r}, want rising block indices from 0 to {self.num_blocks - 1}"
            )

    def _patches(self, tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The patches of a block's output, which starts with all `num_tokens` tokens, or is patches only."""
        if tokens.shape[1] == num_tokens - self.backbone.num_prefix_tokens:
            return tokens
        # A copy: if it is kept for backward, a view would keep the other rows alive too.
        return tokens[:, self.backbone.num_prefix_tokens : num_tokens].contiguous()


def _start_head(head: nn.Linear) -> None:
    nn.init.kaiming_normal_(head.weight, a=0, mode="fan_out")
    nn.init.constant_(head.bias, _HEAD_BIAS)


class FrozenClassifier(TunedClassifier):
    """A model whose frozen blocks are folded and run on the engine.

    Args:
        model, origin: from `backbones.resolve.resolve_backbone`.
        num_classes: outputs of the head.
        pool: what the head reads: None for the backbone's own pooling, or a name in `timm_vit.POOLS`.
        dtype: of the frozen weights; None for the backbone's own. Trained parameters are at least float32.
        backend, attention: see `kernels.get_backend`.
        timm_blocks: how many of the last blocks stay timm's own, for methods that train them; 0 for a Swin.
        residual_dtype: see `timm_vit.FrozenViT`; None for a Swin or ConvNet.

    Raises:
        ValueError: an argument out of range, or a part of the backbone that is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        origin: Origin,
        num_classes: int,
        *,
        pool: str | None,
        dtype: torch.dtype | None,
        backend: str,
        attention: str,
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        backbone: FrozenViT | FrozenSwin | FrozenConvNet
        if isinstance(model, SwinTransformer):
            backbone = FrozenSwin(model, dtype, backend, attention)
        elif isinstance(model, CONVNET.model):
            backbone = FrozenConvNet(model, dtype, backend, attention)
        else:
            assert isinstance(model, TimmViT)
            backbone = frozen_vit(model, dtype, backend, attention, timm_blocks, residual_dtype)
        super().__init__(backbone, origin, num_classes, pool=pool)
        self._dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        self._backend, self._attention = backend, attention

    @torch.inference_mode(False)  # in inference mode autograd saves nothing that could be counted
    def _bytes_behind_blocks(self, num_rows: int) -> int:
        """Bytes kept for backward of one image by pooling, which reads `num_rows` rows (under autocast it is
        less), and of the head its input."""
        pooling = self.backbone.features_bytes(num_rows, self.pool)
        return pooling + self.num_features * self._feature_dtype.itemsize

    def _options(self) -> dict[str, Any]:
        return {"dtype": self._dtype, "backend": self._backend, "attention": self._attention}


class PromptedClassifier(FrozenClassifier):
    """A FrozenClassifier with a memory policy, which selects what blocks keep for backward.

    Args:
        memory: a name in `engine.policy.MEMORY`.
        args, kwargs: see `FrozenClassifier`.
    """

    def __init__(self, *args: Any, memory: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory = memory
        # Kept outside the blocks per image of the model's own size, and by others in proportion to their
        # patches, which "auto" leaves room for; None: by pooling and the head.
        self.bytes_beside: int | None = None
        # What "auto" has chosen. By device too: a model may be asked before it is moved.
        self._chosen: dict[tuple[Any, ...], str] = {}  # by what `_choose_policy` is called with

    @property
    def memory(self) -> str:
        """What is kept for backward, a name in `engine.policy.MEMORY`; may be changed at any time."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        check_memory(memory)
        self._memory = memory

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's name for ``memory = "recompute"``, or ``"exact"`` if not `enable`."""
        self.memory = "recompute" if enable else "exact"

    def memory_policy(self, batch_size: int, num_tokens: int | None = None) -> str:
        """Name of the policy that a training step with the model's own prompts uses: `memory`, or what
        ``"auto"`` chooses.

        ``"auto"`` checks the free memory once for each batch size, N, compute dtype and device, and keeps its
        choice.

        Args:
            batch_size: images per step.
            num_tokens: N; None for the model's own image size.

        Raises:
            ValueError: one of them is not a whole number of at least 1.
        """
        batch_size = check_count("batch_size", batch_size)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens)
        return self._policy_name(batch_size, num_tokens or self.backbone.num_tokens)

    def _policy(self, batch_size: int, num_tokens: int, sets: Sequence[torch.Tensor] | None) -> MemoryPolicy:
        """The policy of a forward pass. sets: prompts (1 or B, m, width) that are passed to it, or None."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return POLICIES["exact"]  # nothing is kept, so the free memory need not be checked
        return POLICIES[self._policy_name(batch_size, num_tokens, sets)]

    def _policy_name(
        self, batch_size: int, num_tokens: int, sets: Sequence[torch.Tensor] | None = None
    ) -> str:
        """`memory_policy` without its checks: for empty batches and a compiler's symbolic sizes too."""
        if self.memory != "auto":
            return self.memory
        # A compiler specialises symbolic sizes here: the choice is for these.
        sizes = operator.index(batch_size), operator.index(num_tokens)
        given = None
        if sets is not None:
            given = tuple((operator.index(own.shape[0]), operator.index(own.shape[1])) for own in sets)
        key = (*sizes, given, self._compute_dtype, self.backbone.device)
        if key not in self._chosen:
            self._chosen[key] = self._choose_policy(*key)
        return self._chosen[key]

    @torch.compiler.assume_constant_result  # Dynamo calls it when it traces the first step of these sizes
    def _choose_policy(
        self,
        batch_size: int,
        num_tokens: int,
        given: PromptShapes | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> str:
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "memory: got 'auto' in a replica of nn.DataParallel's, where memory is not estimated; "
                f"want one of {', '.join(map(repr, POLICIES))}, or DistributedDataParallel"
            )
        beside = self._bytes_beside_blocks(batch_size, num_tokens, given)

        def step_bytes(memory: str) -> int:
            return beside + sum(self._step_bytes(batch_size, num_tokens, dtype, POLICIES[memory], given))

        return choose_policy(step_bytes, dtype, free_bytes(device))

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.backbone.device.type, self.backbone.blocks[0].qkv_weight.dtype)

    def _training_bytes(self, batch_size: int) -> cost.TrainingBytes:
        """In the compute dtype (the model's own, or autocast's; outside the blocks always the model's own)
        and under the memory policy."""
        num_tokens = self.backbone.num_tokens
        policy = POLICIES[self._policy_name(batch_size, num_tokens)]
        kept, workspace = self._step_bytes(batch_size, num_tokens, self._compute_dtype, policy)
        kept += self._bytes_beside_blocks(batch_size, num_tokens)
        return cost.TrainingBytes(weights=self._weight_bytes(), kept=kept, workspace=workspace)

    def _step_bytes(
        self,
        batch_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        policy: MemoryPolicy,
        given: PromptShapes | None = None,
    ) -> tuple[int, int]:
        """Bytes that blocks keep for backward, and bytes that temporaries add at the peak. given: shapes of
        prompts that are passed, or None for the model's own."""
        raise NotImplementedError

    def _num_rows_read(self, num_tokens: int, given: PromptShapes | None) -> int:
        """R, the rows of the last block's output that the head reads, of N tokens and the prompts. given: as
        for `_step_bytes`."""
        raise NotImplementedError

    def _bytes_beside_blocks(
        self, batch_size: int, num_tokens: int, given: PromptShapes | None = None
    ) -> int:
        """Bytes kept for backward outside the blocks: unless `bytes_beside` says them, behind the blocks."""
        if self.bytes_beside is not None:
            prefix = self.backbone.num_prefix_tokens
            patches, own = num_tokens - prefix, self.backbone.num_tokens - prefix
            return batch_size * self.bytes_beside * patches // own
        return batch_size * self._bytes_behind_blocks(self._num_rows_read(num_tokens, given))


class TrainedPart(nn.Module):
    """A model's trained part as a module: `frozen_features` to logits, with the same parameters."""

    def __init__(self, model: TunedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.classify(features)
