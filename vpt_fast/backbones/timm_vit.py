"""Reading a timm VisionTransformer: the frozen blocks, and everything before and after them.

What timm can build and this file does not know raises; nothing is approximated.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import timm.data
import torch
from timm.layers import GELU, GELUTanh, GluMlp, LayerScale, Mlp, QuickGELU, RmsNorm, SwiGLU
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vpt_fast.engine import cost
from vpt_fast.engine.block import FrozenBlock, compute_dtype
from vpt_fast.engine.plan import Read, row_range
from vpt_fast.engine.policy import POLICIES
from vpt_fast.engine.weights import BlockParts, LinearParts, NormParts, fold
from vpt_fast.kernels import get_backend

# Pooling by name: the mean over these rows, after the final norm (Fig. 8).
POOLS = {
    "cls": Read.CLS,
    "image": Read.PATCHES,
    "prompts": Read.PROMPTS,
    "image_and_prompts": Read.PATCHES_AND_PROMPTS,
}


def require_plain_pytorch(what: str, backend: str, attention: str) -> None:
    """Raises ValueError for an implementation that there is only for VisionTransformers."""
    for name, value, wanted in (
        ("backend", backend, ("auto", "torch")),
        ("attention", attention, ("auto",)),
    ):
        if value not in wanted:
            raise ValueError(f"{name}: got {value!r} with {what}; want {' or '.join(map(repr, wanted))}")


def fingerprint(model: nn.Module, classifier: str | None = "head") -> str:
    """SHA-256 over the names, shapes and float32 values of every weight but those of the module `classifier`;
    on the meta device, where there are no values, over names and shapes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if classifier is not None and name.startswith(f"{classifier}."):
            continue
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if not weight.is_meta:
            digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


class FrozenViT(nn.Module):
    """A timm VisionTransformer with frozen, folded blocks and no classifier.

    The given model is read and not changed: the blocks' weights are folded copies, the rest is copied.
    Every parameter has requires_grad False, and the module stays in eval mode whatever `train` is called
    with, since a frozen backbone has no dropout to switch on; timm's own blocks alone do not.

    Args:
        vit: the model to read.
        dtype: of the frozen weights; None keeps the model's own.
        backend, attention: see `kernels.get_backend`.
        timm_blocks: how many of the last blocks are copies of timm's own and not folded, for methods that
            train in them. They and what stands behind them are in float32 or more, whatever `dtype` is.
        residual_dtype: of the residual stream, the tokens between blocks: None for float32 or more.

    Raises:
        ValueError: the model has a part that is not supported; the message names it.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        attention: str = "auto",
        timm_blocks: int = 0,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        operations = get_backend(backend, attention)
        _check(vit)
        self.residual_dtype = residual_dtype
        # Everything but blocks and classifier, in one deep copy.
        self.stem: VisionTransformer = copy.deepcopy(
            vit, memo={id(vit.blocks): nn.Identity(), id(vit.head): nn.Identity()}
        )
        self.stem.requires_grad_(False)
        if dtype is not None:
            self.stem.to(dtype)
        self.num_folded = len(vit.blocks) - timm_blocks
        blocks: list[nn.Module] = []
        for index, block in enumerate(vit.blocks):
            parts = _block_parts(block, index)
            if index < self.num_folded:
                blocks.append(FrozenBlock(*fold(parts, dtype), operations))
            else:
                blocks.append(_at_least_float32(copy.deepcopy(block)))
        # A ModuleList, typed as what it holds most often.
        self.blocks: Sequence[FrozenBlock] = nn.ModuleList(blocks).requires_grad_(False)  # type: ignore
        if timm_blocks:
            for name in ("norm", "attn_pool", "fc_norm"):
                if getattr(vit, name) is not None:
                    module = _at_least_float32(copy.deepcopy(getattr(vit, name)))
                    setattr(self.stem, name, module.requires_grad_(False))
        self.eval()
        # Read off the model as it came: folding and dtype do not change which backbone it is.
        self.fingerprint = fingerprint(vit)
        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(vit)
        self.num_parameters = sum(
            p.numel() for name, p in vit.named_parameters() if not name.startswith("head.")
        )

    def train(self, mode: bool = True) -> FrozenViT:
        """Puts timm's own blocks in this mode; all else stays in eval mode."""
        super().train(False)
        for block in self.timm_blocks:
            block.train(mode)
        return self

    @property
    def folded_blocks(self) -> Sequence[FrozenBlock]:
        """The first blocks, which are folded."""
        return self.blocks[: self.num_folded]

    @property
    def timm_blocks(self) -> Sequence[Block]:
        """The last blocks, as far as they are timm's own."""
        return self.blocks[self.num_folded :]  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.stem.patch_embed.proj.weight.device

    @property
    def embed_dim(self) -> int:
        return self.stem.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        return self.stem.num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """N at the model's own image size: prefix tokens and patches."""
        return self.num_prefix_tokens + self.stem.patch_embed.num_patches

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the position embedding was made for."""
        return tuple(self.stem.patch_embed.img_size)

    @property
    def in_chans(self) -> int:
        """Channels of the images, before any that prompts add."""
        return self.stem.in_chans

    @property
    def takes_any_size(self) -> bool:
        """Whether images may be of another size than `image_size` (timm's dynamic_img_size)."""
        return not self.stem.patch_embed.strict_img_size

    @property
    def pads_images(self) -> bool:
        """Whether images of any size are padded to whole patches (timm's dynamic_img_pad)."""
        return self.stem.patch_embed.dynamic_img_pad

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.stem.patch_embed.patch_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> tokens before the first block (B, N, d), in `residual_dtype`.

        Float32 costs no memory but under the policy "recompute", since else the residual stream is not kept
        for backward; it costs time, since every block reads and writes it.
        """
        x = self.stem.patch_embed(images.to(self.stem.patch_embed.proj.weight.dtype))
        x = self._norm_pre(self.stem.patch_drop(self.stem._pos_embed(x)))
        # Without a prefix token nothing has copied the convolution's channels to the end yet.
        return x.to(self.residual_dtype or torch.promote_types(x.dtype, torch.float32)).contiguous()

    def embed_pixel_prompts(self, pixels: torch.Tensor) -> torch.Tensor:
        """Prompts given as a strip of patches: (1, C, p, p·m) -> (1, m, d), with no position added."""
        patch_embed = self.stem.patch_embed
        x = patch_embed.proj(pixels.to(patch_embed.proj.weight.dtype)).flatten(2).transpose(1, 2)
        x = self._norm_pre(patch_embed.norm(x))
        return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()

    def run_folded(self, tokens: torch.Tensor, last: Read) -> torch.Tensor:
        """Tokens (B, N, d) through the folded blocks, without prompts, to the rows of the last one's output
        that `last` names (B, R, d)."""
        num_tokens, x = tokens.shape[1], tokens
        for index, block in enumerate(self.folded_blocks):
            read = last if index == self.num_folded - 1 else Read.TOKENS
            x = block(x, None, row_range(read, num_tokens, self.num_prefix_tokens, 0), POLICIES["exact"])
        return x

    def folded_workspace(self, batch_size: int) -> int:
        """Bytes of temporaries while a folded block runs; 0 without any."""
        return max(
            (
                cost.workspace_bytes(
                    block,
                    dtype=compute_dtype(self.device.type, block.qkv_weight.dtype),
                    batch_size=batch_size,
                    num_rows=self.num_tokens,
                    policy=POLICIES["exact"],
                )
                for block in self.folded_blocks
            ),
            default=0,
        )

    def _norm_pre(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem.norm_pre(x.to(dtype_of(self.stem.norm_pre, default=x.dtype)))

    def head_reads(self, pool: str | None) -> Read:
        """The rows that pooling by `pool` reads; None is the model's own pooling.

        Raises:
            ValueError: a pool that this model has no tokens for.
        """
        if pool is None:
            if self.stem.attn_pool is None and self.stem.global_pool == "token":
                return Read.CLS
            return Read.TOKENS if self.stem.pool_include_prefix else Read.PATCHES
        if pool == "cls" and not self.stem.has_class_token:
            raise ValueError("pool: got 'cls', and this backbone has no CLS token")
        return POOLS[pool]

    def head_reads_of_image(self, pool: str | None) -> Read:
        """`head_reads` for a model without prompts.

        Raises:
            ValueError: a pool that this model has no tokens for.
        """
        reads = self.head_reads(pool)
        if reads.prompts:
            raise ValueError(f"pool: got {pool!r}, and the model has no prompts; want None, 'cls' or 'image'")
        return reads

    def features(self, rows: torch.Tensor, pool: str | None) -> torch.Tensor:
        """The rows that `head_reads(pool)` names, after the last block (B, R, d), to features (B, d)."""
        stem = self.stem
        x = stem.norm(rows.to(dtype_of(stem.norm, stem.fc_norm, stem.attn_pool, default=rows.dtype)))
        if pool is not None:
            x = x[:, 0] if pool == "cls" else x.mean(dim=1)
        elif stem.attn_pool is not None:
            x = stem.attn_pool(x)
        elif stem.global_pool == "token":
            x = x[:, 0]
        elif stem.global_pool == "avg":
            x = x.mean(dim=1)
        elif stem.global_pool == "max":
            x = x.amax(dim=1)
        else:  # avgmax; _check lets no other through
            x = 0.5 * (x.amax(dim=1) + x.mean(dim=1))
        return stem.fc_norm(x)


def _at_least_float32(module: nn.Module) -> nn.Module:
    return module.to(torch.promote_types(dtype_of(module, default=torch.float32), torch.float32))


def dtype_of(*modules: nn.Module | None, default: torch.dtype) -> torch.dtype:
    """The dtype of the first weight in the modules, which is what their input must have."""
    for module in modules:
        for parameter in () if module is None else module.parameters():
            return parameter.dtype
    return default


def _check(vit: VisionTransformer) -> None:
    for method in ("forward_features", "_pos_embed", "pool", "forward_head"):
        if getattr(type(vit), method) is not getattr(VisionTransformer, method):
            raise ValueError(f"backbone: {type(vit).__name__} has its own {method}, which is not supported")
    if len(vit.blocks) == 0:
        raise ValueError("backbone: got a VisionTransformer without blocks")
    if vit.attn_pool is None and vit.global_pool not in ("token", "avg", "max", "avgmax"):
        raise ValueError(
            f"backbone: global_pool={vit.global_pool!r} gives no feature vector; "
            "want 'token', 'avg', 'max', 'avgmax' or an attention-pool head"
        )
    if not isinstance(getattr(vit.patch_embed, "proj", None), nn.Conv2d):
        raise ValueError(
            f"backbone: patch embedding {type(vit.patch_embed).__name__} is not supported, want a convolution"
        )


def _block_parts(block: Any, index: int) -> BlockParts:
    where = f"backbone: blocks.{index}"
    if type(block) is not Block:
        raise ValueError(f"{where} is a {type(block).__name__}, which is not supported; want timm's Block")
    attn = block.attn
    if type(attn) is not Attention:
        kind = type(attn).__name__
        raise ValueError(f"{where}.attn is a {kind}, which is not supported; want timm's Attention")
    if attn.gate is not None:
        raise ValueError(f"{where}.attn has an output gate, which is not supported")
    if not isinstance(attn.norm, nn.Identity):
        raise ValueError(f"{where}.attn has a norm on its output (scale_attn_norm), which is not supported")
    has_qk_norm = not isinstance(attn.q_norm, nn.Identity)
    fc1, fc2, activation = mlp_parts(block.mlp, f"{where}.mlp")
    return BlockParts(
        num_heads=attn.num_heads,
        norm1=norm_parts(block.norm1, f"{where}.norm1"),
        qkv=linear_parts(attn.qkv),
        q_norm=norm_parts(attn.q_norm, f"{where}.attn.q_norm") if has_qk_norm else None,
        k_norm=norm_parts(attn.k_norm, f"{where}.attn.k_norm") if has_qk_norm else None,
        proj=linear_parts(attn.proj),
        scale1=_layer_scale(block.ls1, f"{where}.ls1"),
        norm2=norm_parts(block.norm2, f"{where}.norm2"),
        fc1=fc1,
        activation=activation,
        fc2=fc2,
        scale2=_layer_scale(block.ls2, f"{where}.ls2"),
    )


def linear_parts(linear: Any) -> LinearParts:
    return LinearParts(linear.weight, linear.bias)


def norm_parts(norm: nn.Module, where: str) -> NormParts:
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        return NormParts("layer", norm.eps, norm.weight, norm.bias)
    if isinstance(norm, (RmsNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
        # torch's RMSNorm reads eps None as the machine epsilon of its input, which here is float32.
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        return NormParts("rms", eps, norm.weight, None)
    raise ValueError(f"{where} is a {type(norm).__name__}, which is not supported; want LayerNorm or RMSNorm")


def _layer_scale(scale: nn.Module, where: str) -> torch.Tensor | None:
    if isinstance(scale, nn.Identity):
        return None
    if isinstance(scale, LayerScale):
        return scale.gamma
    raise ValueError(f"{where} is a {type(scale).__name__}, which is not supported; want LayerScale")


def _activation(act: Any, where: str) -> str:
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    names: dict[type, str] = {
        GELU: "gelu",
        GELUTanh: "gelu_tanh",
        QuickGELU: "quick_gelu",
        nn.SiLU: "silu",
        nn.ReLU: "relu",
    }
    if type(act) not in names:
        raise ValueError(f"{where}.act is a {type(act).__name__}, which is not supported")
    return names[type(act)]


def mlp_parts(mlp: Any, where: str) -> tuple[LinearParts, LinearParts, str]:
    """fc1 with the gate before the value where there is one, fc2, and the activation's name."""
    if type(mlp) not in (Mlp, GluMlp, SwiGLU):
        raise ValueError(
            f"{where} is a {type(mlp).__name__}, which is not supported; want timm's Mlp, GluMlp or SwiGLU"
        )
    if not isinstance(mlp.norm, nn.Identity):
        raise ValueError(f"{where} has a norm inside (scale_mlp_norm), which is not supported")
    activation = _activation(mlp.act, where)
    if type(mlp) is Mlp:
        if not isinstance(mlp.fc1, nn.Linear):
            kind = type(mlp.fc1).__name__
            raise ValueError(f"{where}.fc1 is a {kind}, which is not supported; want Linear")
        return linear_parts(mlp.fc1), linear_parts(mlp.fc2), activation
    if activation != "silu":
        raise ValueError(f"{where} is gated by {activation}, which is not supported; want SiLU (SwiGLU)")
    if type(mlp) is GluMlp:
        if mlp.gate_last:
            fc1 = _join(*(_half(mlp.fc1, half) for half in (1, 0)))
        else:
            fc1 = linear_parts(mlp.fc1)
    else:
        fc1 = _join(linear_parts(mlp.fc1_g), linear_parts(mlp.fc1_x))
    return fc1, linear_parts(mlp.fc2), "swiglu"


def _half(linear: Any, half: int) -> LinearParts:
    bias = None if linear.bias is None else linear.bias.chunk(2)[half]
    return LinearParts(linear.weight.chunk(2)[half], bias)


def _join(gate: LinearParts, value: LinearParts) -> LinearParts:
    bias = None
    if gate.bias is not None and value.bias is not None:
        bias = torch.cat((gate.bias, value.bias))
    return LinearParts(torch.cat((gate.weight, value.weight)), bias)
