"""PromptedViT: visual prompt tuning of a frozen vision transformer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import nn

from vpt_fast.backbones.layers import require_no_hooks, require_plain
from vpt_fast.backbones.patches import PatchProjection
from vpt_fast.backbones.resolve import resolve_backbone
from vpt_fast.backbones.timm_vit import size_of
from vpt_fast.backbones.vit import TimmViT
from vpt_fast.classifier import PromptedClassifier, check_arguments
from vpt_fast.engine import cost
from vpt_fast.engine.block import FrozenBlock
from vpt_fast.engine.plan import BlockPlan, Read, plan_blocks, row_range
from vpt_fast.engine.policy import MemoryPolicy, check_memory
from vpt_fast.engine.stream import Stream
from vpt_fast.prompts import (
    IN_ATTENTION,
    IN_BLOCKS,
    IN_IMAGE,
    IN_SEQUENCE,
    PromptConfig,
    PromptShapes,
    check_given,
    check_given_sets,
    drop,
    fill_from_tokens,
    init_bound,
    mask_bytes,
    pad_image,
    require_shape,
    require_tokens,
    split_sets,
)

Prompts = torch.Tensor | Sequence[torch.Tensor]  # that a caller passes

# Not float16: the residual streams of large ViTs exceed its range.
RESIDUAL_DTYPES = (None, torch.bfloat16)


class PromptedViT(PromptedClassifier):
    """A frozen vision transformer tuned by visual prompts (Jia et al., ECCV 2022).

    Logits, loss and gradients equal those of an ordinary ViT with the prompts concatenated to its sequence,
    without the unnecessary work of concatenation (see `engine`).

    Args:
        backbone: a timm name, a name in `backbones.known`, or a timm VisionTransformer, Eva or Beit, whose
            weights are used as they are and which is not changed. With ``pad``, the image size of a named
            backbone excludes the border; an instance must have been built for the size that includes it.
        num_classes: outputs of the head.
        num_prompts, prompt_type, prompt_layers, after_prompts, prompt_location, prompt_shared,
        prompt_project, prompt_dropout, prompt_dropout_per: see `prompts.PromptConfig`.
        pool: what the head reads after the final norm: ``"cls"``, or the mean over the patches
            (``"image"``), the prompts (``"prompts"``) or both (``"image_and_prompts"``; Fig. 8). None: the
            backbone's own pooling, or the paper's choice for a name in `backbones.known`.
        dtype: of the frozen weights, the matrix products and what is kept for backward; None for the
            backbone's own. Prompts and head are at least float32.
        residual_dtype: of the residual stream (the tokens between blocks): None for at least float32.
            ``torch.bfloat16`` rounds it after every block, as in a model that is all in bfloat16; this
            halves its memory traffic and what ``memory="recompute"`` keeps.
        backend: ``"auto"``, ``"torch"``, ``"triton"`` or ``"triton_fused_mlp"``, see `kernels.get_backend`.
        attention: ``"auto"`` or a FlashAttention implementation by name, see `kernels.get_backend`.
        memory: what is kept for backward: ``"exact"``, ``"compact"`` (gradients carry the rounding of 8-bit
            codes), ``"recompute_mlp"``, ``"recompute"``, see `engine.policy.MemoryPolicy`; ``"auto"``: the
            fastest of them that fits the memory free at the first step with that batch size
            (``"compact"`` only with 16-bit products). May be changed at any time.
        pretrained: load the published weights (only with a name).
        checkpoint: load the weights from this file instead (only with a name), see docs/backbones.md.
        timm_kwargs: passed to timm.create_model (only with a name).

    Attributes:
        prompts: the trained prompts: (prompted blocks, m, d); (1, m, d) if shallow or shared; (.., m, p)
            with `prompt_project` p. ``key-value``: 2·H·D in place of d, for H heads of D dimensions: the keys
            of all heads, then the values, as attention takes them (past query-key normalisation). ``add``: m
            is the number of tokens; ``add-1``: 1; ``prepend-pixel``: (1, C, patch height, m · patch width);
            ``pad``: (1, 3, 2m, W + 2m), the rows above the image, then those below; ``concat-channel``:
            (1, m, H, W).
        prompts_sides: (``pad`` only) (1, 3, H, 2m), the columns left of the image, then those right of it.
        prompt_projection: (with `prompt_project` only) nn.Linear from p to d, or 2·H·D, dimensions.
        head: nn.Linear, from `num_features` features to logits.

    Raises:
        ValueError: an argument out of range, settings that exclude each other, or a part of the backbone
            that is not supported; the message names it.
    """

    def __init__(
        self,
        backbone: str | TimmViT,
        num_classes: int,
        num_prompts: int | None = None,
        prompt_type: str = "deep",
        *,
        prompt_layers: int | Sequence[int] | None = None,
        after_prompts: str = "flow",
        prompt_location: str = "prepend",
        prompt_shared: bool = False,
        prompt_project: int | None = None,
        prompt_dropout: float = 0.0,
        prompt_dropout_per: str = "image",
        pool: str | None = None,
        dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        memory: str = "exact",
        pretrained: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        # Every setting is checked before the backbone is built or downloaded.
        check_arguments(num_classes, pool, dtype, backend, attention)
        check_memory(memory)
        if residual_dtype not in RESIDUAL_DTYPES:
            raise ValueError(
                f"residual_dtype: got {residual_dtype}, want one of {', '.join(map(str, RESIDUAL_DTYPES))}"
            )
        settings = PromptConfig(
            num_prompts=num_prompts,
            prompt_type=prompt_type,
            prompt_layers=prompt_layers,  # type: ignore[arg-type]  # made a tuple there
            after_prompts=after_prompts,
            prompt_location=prompt_location,
            prompt_shared=prompt_shared,
            prompt_project=prompt_project,
            prompt_dropout=prompt_dropout,
            prompt_dropout_per=prompt_dropout_per,
        )
        if pool in ("prompts", "image_and_prompts") and prompt_location not in IN_SEQUENCE:
            raise ValueError(
                f"pool: got {pool!r} with prompt_location={prompt_location!r}, whose prompts have no "
                "outputs; want None, 'cls' or 'image'"
            )
        border = settings.border
        vit, origin = resolve_backbone(
            backbone, pretrained, timm_kwargs, border=border, checkpoint=checkpoint
        )
        if pool is None and prompt_location in IN_SEQUENCE:
            pool = origin.prompted_pool
        super().__init__(
            vit,
            origin,
            num_classes,
            pool=pool,
            dtype=dtype,
            backend=backend,
            attention=attention,
            memory=memory,
            residual_dtype=residual_dtype,
        )
        self.prompt_settings = settings
        self._prompted = settings.prompted_blocks(self.num_blocks)
        self._plans = self._plans_to(self.num_blocks - 1, self.backbone.head_reads(pool))
        self._make_prompts()

    def _make_prompts(self) -> None:
        settings, device = self.prompt_settings, self.backbone.device
        location, m = settings.prompt_location, settings.num_prompts
        channels, (height, width) = self.backbone.in_chans, self.image_size
        shape: tuple[int, ...]
        if location in IN_BLOCKS:
            expected = {"add": self.backbone.num_tokens, "add-1": 1}.get(location, m)
            if m is not None and m != expected:
                raise ValueError(
                    f"num_prompts: got {m} with prompt_location={location!r}, want None or {expected}"
                )
            num_sets = 1 if settings.prompt_shared else len(self._prompted)
            shape = (num_sets, expected, settings.prompt_project or self._prompt_width)
        elif location == "prepend-pixel":
            shape = (1, channels, self.patch_size[0], m * self.patch_size[1])
        elif location == "pad":
            if channels != 3:
                raise ValueError(
                    f"prompt_location: got 'pad' with a backbone for {channels} channels; "
                    "its border is made of RGB pixels"
                )
            if min(height, width) < 1:
                built = "x".join(map(str, self.backbone.image_size))
                raise ValueError(
                    f"num_prompts: got {m} with prompt_location='pad' and a backbone built for {built}, "
                    "border included, which leaves no image within; want fewer"
                )
            shape = (1, 3, 2 * m, width + 2 * m)
            self.prompts_sides = nn.Parameter(torch.rand(1, 3, height, 2 * m, device=device))
        else:  # concat-channel
            shape = (1, m, height, width)
            self._widen_patch_embedding(m)
        # The bound depends on the width of prompts that are projected, and for others on the model's.
        bound = init_bound(self.patch_size, settings.prompt_project or self.embed_dim)
        low, high = (0.0, 1.0) if location == "pad" else (-bound, bound)
        self.prompts = nn.Parameter(torch.empty(shape, device=device).uniform_(low, high))
        self._prompt_shape = shape
        self.prompt_projection: nn.Linear | None = None
        if settings.prompt_project is not None:
            self.prompt_projection = nn.Linear(settings.prompt_project, self._prompt_width, device=device)
            nn.init.kaiming_normal_(self.prompt_projection.weight, a=0, mode="fan_out")

    @property
    def _prompt_width(self) -> int:
        """Of a prompt as it enters a block: d, or 2·H·D if it is a key and a value of every head."""
        if not self.prompt_settings.key_value:
            return self.embed_dim
        spec = self.backbone.blocks[0].spec
        return 2 * spec.num_heads * spec.head_dim

    def _widen_patch_embedding(self, extra: int) -> None:
        """Adds `extra` input channels to the patch embedding and trains all of it, in at least float32."""
        frozen = self.backbone.stem.patch_embed.proj
        require_no_hooks(frozen, "backbone: patch_embed.proj")
        if not isinstance(frozen, PatchProjection):
            require_plain(frozen, nn.Conv2d, "backbone: patch_embed.proj")
        if frozen.groups > 1:
            raise ValueError(
                f"prompt_location: got 'concat-channel' with a backbone whose patch_embed.proj has "
                f"{frozen.groups} groups, among which there is no place for {extra} more channels"
            )
        wide = torch.promote_types(frozen.weight.dtype, torch.float32)
        trained = nn.Conv2d(
            frozen.in_channels + extra,
            frozen.out_channels,
            frozen.kernel_size,
            frozen.stride,
            bias=frozen.bias is not None,
            device=frozen.weight.device,
            dtype=wide,
        )
        bound = init_bound(self.patch_size, self.embed_dim)
        with torch.no_grad():
            nn.init.uniform_(trained.weight, -bound, bound)
            trained.weight[:, : frozen.in_channels] = frozen.weight
            if trained.bias is not None:
                trained.bias.copy_(frozen.bias)
        self.backbone.stem.patch_embed.proj = trained
        self.backbone.stem.patch_embed.norm.to(wide)  # it takes no input of another dtype than its own

    def _options(self) -> dict[str, Any]:
        residual = self.backbone.residual_dtype
        name = None if residual is None else str(residual).removeprefix("torch.")
        return {**super()._options(), "residual_dtype": name, **asdict(self.prompt_settings)}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's input images, without the border of ``pad``."""
        height, width = self.backbone.image_size
        border = self.prompt_settings.border
        return height - 2 * border, width - 2 * border

    def forward(self, images: torch.Tensor, prompts: Prompts | None = None) -> torch.Tensor:
        """Normalised images (B, C, H, W) to logits (B, num_classes).

        Args:
            images: (B, C, H, W).
            prompts: used in place of `self.prompts`: of the same shape, or (B, *shape) where each image has
                prompts of its own, such as a network computes from the image, or those of its task. Or a
                sequence of tensors, one for each set (of a prompted block, or of all that share it), (m, d),
                or (B, m, d) with each image's own; ``prepend`` and ``key-value`` take any m, which may
                differ from set to set. Gradients flow to them. Projection, dropout and sharing apply as to
                the model's own. None: the model's own.

        Raises:
            ValueError: images or prompts of the wrong shape, or prompts for a model whose own are pixels.
        """
        return self.head(self.image_features(images, prompts))

    def image_features(self, images: torch.Tensor, prompts: Prompts | None = None) -> torch.Tensor:
        """As of every model; `prompts` as for `forward`."""
        (rows,), _ = self._outputs(images, prompts, self._plans, (self.num_blocks - 1,))
        return self._features(rows)

    @property
    def feature_shape(self) -> tuple[int, int] | None:
        """(N, d), where blocks come before the first one with prompts; else None."""
        return (self.backbone.num_tokens, self.embed_dim) if self._prompted[0] > 0 else None

    def frozen_features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the tokens before the first block with prompts (B, N, d), as of
        every model."""
        first = self._first_after_features()
        self._check_images(images)
        (x,) = self.backbone.folded_outputs(images, (first - 1,), Read.TOKENS)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    @property
    def features_config(self) -> dict[str, Any]:
        """As of every model. The prompts' settings do not matter to the blocks before the first prompts, but
        for how many these are."""
        config = self.config.to_dict()
        prompts = asdict(self.prompt_settings)
        options = {name: value for name, value in config["options"].items() if name not in prompts}
        return {**config, "options": options, "num_frozen_blocks": self._prompted[0]}

    def classify(self, features: torch.Tensor, prompts: Prompts | None = None) -> torch.Tensor:
        """`frozen_features` of images of the model's own size (B, N, d) to logits (B, num_classes); `prompts`
        as for `forward`."""
        first, last = self._first_after_features(), self.num_blocks - 1
        (rows,), _ = self._outputs(features, prompts, self._plans, (last,), first=first)
        return self.head(self._features(rows))

    def _first_after_features(self) -> int:
        """The block that reads `frozen_features`."""
        if self.feature_shape is None:
            raise NotImplementedError(
                f"prompt_layers: got {self.prompt_settings.prompt_layers}, and with prompts in the first "
                "block there are no frozen features"
            )
        return self._prompted[0]

    def forward_features(self, images: torch.Tensor, prompts: Prompts | None = None) -> torch.Tensor:
        """Normalised images (B, C, H, W) to the tokens after the final norm, without the prompts.

        Like timm's `forward_features` of the backbone, but influenced by the prompts.

        Args: as for `forward`.

        Returns:
            (B, prefix tokens + patches, d), in the residual stream's dtype.

        Raises:
            ValueError: as `forward`.
        """
        last = self.num_blocks - 1
        (x,), _ = self._outputs(images, prompts, self._plans_to(last, Read.TOKENS), (last,))
        return self.backbone.normalize(x).to(x.dtype)

    def patch_tokens(
        self, images: torch.Tensor, blocks: Sequence[int], prompts: Prompts | None = None
    ) -> list[torch.Tensor]:
        """As of every model; `prompts` as for `forward`."""
        self._check_blocks(blocks)
        plans = self._plans_to(blocks[-1], Read.PATCHES)
        outputs, num_tokens = self._outputs(images, prompts, plans, blocks)
        return [self._patches(x, num_tokens) for x in outputs]

    @torch.no_grad()
    def attention_maps(
        self, images: torch.Tensor, blocks: Sequence[int], prompts: Prompts | None = None
    ) -> list[torch.Tensor]:
        """Normalised images (B, C, H, W) to attention's probabilities in the given blocks.

        They are recomputed for this by the definition, since attention's kernels never write them.

        Args:
            images, prompts: as for `forward`.
            blocks: indices from 0, in ascending order.

        Returns:
            (B, heads, N, N + m) for each block, without gradients, at least float32: each of an image's N
            tokens (prefix tokens, then patches in row-major order) over those tokens, then over the m prompts
            in the block, if there are any.

        Raises:
            ValueError: as `forward`, or no such blocks.
        """
        self._check_blocks(blocks)
        maps: list[torch.Tensor] = []
        key_value = self.prompt_settings.key_value

        def look(block: FrozenBlock, stream: Stream, own: torch.Tensor | None, *call: Any) -> None:
            found = block.attention_probabilities(stream, own, *call, key_value=key_value)
            m = found.shape[-1] - stream.num_tokens  # prompts that flow on are among the stream's tokens
            maps.append(torch.cat((found[..., m:], found[..., :m]), dim=-1))

        self._outputs(images, prompts, self._plans_to(blocks[-1], Read.CLS), blocks, look)
        return maps

    @torch.no_grad()
    def init_prompts_from(self, images: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Starts the prompts of a new model from tokens of images, in place of uniform random numbers.

        Each prompt becomes the token of a random patch where it enters the prompt's block, in the backbone
        without prompts (SPT: Wang et al., Revisiting the Power of Prompt for Visual Tuning, ICML 2024, with
        random tokens). Shared prompts become tokens that enter the first prompted block.

        Args:
            images: normalised training images (B, C, H, W), with B times their patches at least m.
            generator: of the random choice, on the CPU; None: PyTorch's own.

        Raises:
            ValueError: images of the wrong shape or too few of them, or prompts that are not tokens of the
                model's width.
        """
        require_tokens(self.prompt_settings)
        require_shape(self.prompts, self._prompt_shape)
        self._check_images(images)
        prompted = self._prompted[: len(self.prompts)]
        inputs = enumerate(self.backbone.folded_inputs(images))
        patches = (x[:, self.backbone.num_prefix_tokens :] for index, x in inputs if index in prompted)
        fill_from_tokens(list(self.prompts), patches, generator)

    def _plans_to(self, last: int, read: Read) -> tuple[BlockPlan, ...]:
        """The plans of the blocks up to `last`; `read`: which rows of its output are read."""
        settings = self.prompt_settings
        in_attention = settings.prompt_location in IN_ATTENTION
        prompted = [index for index in self._prompted if index <= last] if in_attention else []
        # Keys and values have no outputs that could flow on.
        after = settings.after_prompts if settings.prompt_location in IN_SEQUENCE else "drop"
        return plan_blocks(last + 1, prompted, after, read)

    def _outputs(
        self,
        images: torch.Tensor,
        given: Prompts | None,
        plans: Sequence[BlockPlan],
        wanted: Sequence[int],
        look: Callable[..., None] | None = None,
        *,
        first: int = 0,
    ) -> tuple[list[torch.Tensor], int]:
        """Runs images through the blocks that have a plan. Returns the rows (B, R, d) that are read of each
        block in `wanted`, and N, the number of an image's tokens.

        images: (B, C, H, W); with `first` their tokens before that block (B, N, d), if they are of the
            model's own size and no prompts enter before it.
        given: prompts in place of the model's own, or None.
        look: called before each of these blocks: with the block, its stream and prompts, the range of the N
            tokens, and its rotary positions.
        """
        settings = self.prompt_settings
        if first:
            stream = Stream(images.to(self.backbone.residual_dtype or images.dtype))
            height, width = self.image_size
        else:
            stream = Stream(self._tokens(images))
            height, width = size_of(images)
        require_shape(self.prompts, self._prompt_shape)
        batch_size, num_tokens = images.shape[0], stream.num_tokens
        sets = self._prompt_sets(given, batch_size)
        is_added = settings.prompt_location in ("add", "add-1")
        added = dict(zip(self._prompted, sets, strict=True)) if is_added else {}
        policy = self._policy(batch_size, num_tokens, None if given is None else sets)
        border = settings.border
        rotations = self.backbone.rotations((height + 2 * border, width + 2 * border))
        outputs = []
        num_prompts = 0  # of those that were last to enter
        blocks = zip(self.backbone.blocks, plans, rotations, strict=False)  # there may be fewer plans
        for index, (block, plan, rotation) in islice(enumerate(blocks), first, None):
            if index in added:
                prompts = drop(added[index], settings, batch_size, training=self.training)
                stream = Stream((stream.sum() + prompts).to(stream.base.dtype))
            prompts = None
            if plan.prompt_index is not None:
                own = sets[plan.prompt_index]
                num_prompts = own.shape[1]
                prompts = drop(own, settings, batch_size, training=self.training)
                prompts = self.backbone.keys_as_folded(prompts) if settings.key_value else prompts
            rows = row_range(plan.read, num_tokens, self.backbone.num_prefix_tokens, num_prompts)
            if look is not None and index in wanted:
                look(block, stream, prompts, (0, num_tokens), rotation)
            stream = block(stream, prompts, rows, policy, rotation, key_value=settings.key_value)
            if index in wanted:
                outputs.append(stream.sum())
        return outputs, num_tokens

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), combined with prompts that are pixels, to tokens (B, N, d)."""
        location, m = self.prompt_settings.prompt_location, self.prompt_settings.num_prompts
        is_tied = location in ("add", *IN_IMAGE)  # the prompts' shape depends on the image's
        self._check_images(images, f"prompt_location={location!r} is tied to one size" if is_tied else None)
        if location == "pad":
            images = pad_image(images, self.prompts, self.prompts_sides, m)
        elif location == "concat-channel":
            images = torch.cat((images, self.prompts.expand(images.shape[0], -1, -1, -1)), dim=1)
        return self.backbone.embed(images)

    def _prompt_sets(self, given: Prompts | None, batch_size: int) -> tuple[torch.Tensor, ...]:
        """One set of prompts for every prompted block, (1, m, d or 2·H·D), or (B, ..) where those given are
        different for each image; none if prompts are part of the image."""
        settings = self.prompt_settings
        if given is not None and settings.prompt_location not in IN_BLOCKS:
            raise ValueError(
                f"prompts: got some for a model with prompt_location={settings.prompt_location!r}, whose "
                "prompts are pixels; want None"
            )
        if settings.prompt_location == "prepend-pixel":
            return (self.backbone.embed_pixel_prompts(self.prompts),)
        if settings.prompt_location not in IN_BLOCKS:
            return ()
        own = self.prompts
        parts: list[torch.Tensor]
        if given is None:
            parts = [own]
        elif isinstance(given, torch.Tensor):
            parts = [check_given(given, own.shape, own, batch_size)]
        else:
            any_length = settings.prompt_location in IN_ATTENTION
            parts = check_given_sets(given, own, batch_size, any_length=any_length)
        if self.prompt_projection is not None:
            parts = [self.prompt_projection(part) for part in parts]
        sets = tuple(prompts for part in parts for prompts in split_sets(part))
        return sets * len(self._prompted) if settings.prompt_shared else sets

    def _num_rows_read(self, num_tokens: int, given: PromptShapes | None) -> int:
        _, m = self._prompt_shapes(given)[-1]
        first, last = row_range(self._plans[-1].read, num_tokens, self.backbone.num_prefix_tokens, m)
        return last - first

    def _prompt_shapes(self, given: PromptShapes | None) -> PromptShapes:
        """For every prompted block: as given, or else of the model's own prompts."""
        m = self.prompt_settings.num_prompts or self.prompts.shape[-2]
        return ((1, m),) * len(self._prompted) if given is None else given

    @property
    def _trains_tokens(self) -> bool:
        """Whether the tokens before the first block depend on anything that is trained."""
        return self.backbone.trains_embedding or self.prompt_settings.prompt_location in IN_IMAGE

    def _bytes_beside_blocks(
        self, batch_size: int, num_tokens: int, given: PromptShapes | None = None
    ) -> int:
        """As of every model, and before the blocks."""
        beside = super()._bytes_beside_blocks(batch_size, num_tokens, given)
        if not self._trains_tokens:
            return beside
        grad_images = self.prompt_settings.prompt_location in IN_IMAGE
        return beside + batch_size * self.backbone.embed_bytes(grad_images=grad_images)

    def _step_bytes(
        self,
        batch_size: int,
        num_tokens: int,
        dtype: torch.dtype,
        policy: MemoryPolicy,
        given: PromptShapes | None = None,
    ) -> tuple[int, int]:
        settings = self.prompt_settings
        shapes = dict(zip(self._prompted, self._prompt_shapes(given), strict=True))
        in_attention = settings.prompt_location in IN_ATTENTION
        below = self._trains_tokens
        # Prompts are new tensors, formed once for all blocks or anew in each, or else views of the parameter.
        formed_once = self.prompt_projection is not None or settings.prompt_location == "prepend-pixel"
        formed_anew = settings.prompt_dropout > 0.0 or (settings.key_value and self.backbone.reorders_keys)
        peak = cost.Peak()
        copies, m = 0, 0  # of the prompts that were last to enter
        for index, (block, plan) in enumerate(zip(self.backbone.blocks, self._plans, strict=True)):
            below = below or (not in_attention and index in shapes)
            copies, m = shapes.get(index, (copies, m))
            copies = batch_size if settings.masks_per_image else copies
            own = plan.prompt_index is not None
            rows = row_range(plan.read, num_tokens, self.backbone.num_prefix_tokens, m)
            if below or own:
                # Shared prompts that are formed once are kept once.
                is_first = not settings.prompt_shared or plan.prompt_index == 0
                call = cost.BlockCall(
                    block=block,
                    dtype=dtype,
                    batch_size=batch_size,
                    num_tokens=num_tokens + (m if plan.prompts_in else 0),
                    rows=rows,
                    prompt_shape=(copies, m) if own else None,
                    grad_tokens=below,
                    policy=policy,
                    residual_dtype=self.backbone.residual_dtype,
                    key_value=settings.key_value,
                    prompts_formed=own and (formed_anew or (formed_once and is_first)),
                )
                kept = call.kept_bytes()
                if index in shapes:
                    kept += mask_bytes(settings, batch_size, (m, self._prompt_width), self.prompts)
                peak.add(kept, call.workspace_bytes())
            below = below or own
        return peak.kept, peak.workspace
