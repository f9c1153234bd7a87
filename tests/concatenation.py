"""The plain definition of visual prompt tuning, written to be read and trusted, not to be fast.

Prompts are concatenated to the tokens, timm's own blocks run on all of them, and autograd does everything
else. The engine is held against this in float64. Nothing here imports vpt_fast.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH_EMBEDDING = "backbone.stem.patch_embed.proj"  # where PromptedViT holds it; trained with concat-channel


def prompted_blocks(depth: int, prompt_type: str, prompt_layers: int | Sequence[int] | None) -> list[int]:
    """Indices of the blocks with prompts of their own: all, the first k, the last -k, or those named."""
    if prompt_type == "shallow":
        return [0]
    if prompt_layers is None:
        return list(range(depth))
    if isinstance(prompt_layers, int):
        return list(range(depth))[:prompt_layers] if prompt_layers > 0 else list(range(depth))[prompt_layers:]
    return sorted(prompt_layers)


class ConcatenatedViT(nn.Module):
    """A frozen timm VisionTransformer, Eva or Beit with prompts, by concatenation.

    The settings are those of vpt_fast.PromptedViT. The trainable tensors start at zero: take them from
    another model with `load_trainables`.
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva | Beit,
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
    ) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).eval().requires_grad_(False)
        self.location, self.after_prompts, self.pool_type = prompt_location, after_prompts, pool
        self.layers = prompted_blocks(len(vit.blocks), prompt_type, prompt_layers)
        self.shared, self.dropout, self.dropout_per = prompt_shared, prompt_dropout, prompt_dropout_per

        embed = vit.patch_embed
        (height, image_width), (patch_h, patch_w), m = embed.img_size, embed.patch_size, num_prompts or 0
        attention = vit.blocks[0].attn
        self.heads = (attention.num_heads, attention.proj.in_features // attention.num_heads)
        width = 2 * attention.proj.in_features if self.is_key_value else vit.embed_dim
        self.biases = [take_bias(block.attn) for block in self.vit.blocks if isinstance(vit, Beit)]
        sets, dim = 1 if prompt_shared else len(self.layers), prompt_project or width
        shapes: dict[str, tuple[int, ...]] = {
            "prepend": (sets, m, dim),
            "key-value": (sets, m, dim),
            "add": (sets, vit.num_prefix_tokens + embed.num_patches, dim),
            "add-1": (sets, 1, dim),
            "prepend-pixel": (1, 3, patch_h, patch_w * m),
            "pad": (1, 3, 2 * m, image_width),  # the backbone's image is the padded one
            "concat-channel": (1, m, height, image_width),
        }
        self.num_border = m
        self.prompts = nn.Parameter(torch.zeros(shapes[prompt_location]))
        if prompt_location == "pad":
            self.prompts_sides = nn.Parameter(torch.zeros(1, 3, height - 2 * m, 2 * m))
        if prompt_location == "concat-channel":
            proj = embed.proj
            self.patch_embedding = nn.Conv2d(
                3 + m, proj.out_channels, proj.kernel_size, proj.stride, bias=proj.bias is not None
            )
            self.vit.patch_embed.proj = nn.Identity()  # the trainable one runs in its place
        if prompt_project is not None:
            self.prompt_projection = nn.Linear(prompt_project, width)
        self.is_distilled = isinstance(vit, VisionTransformerDistilled) and pool is None
        self.head = nn.Linear(vit.embed_dim * (2 if self.is_distilled else 1), num_classes)

    @property
    def is_key_value(self) -> bool:
        return self.location == "key-value"

    def train(self, mode: bool = True) -> ConcatenatedViT:
        super().train(mode)
        self.vit.eval()
        return self

    def trainables(self) -> dict[str, nn.Parameter]:
        """The trainable tensors under the names that PromptedViT gives them."""
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {name.replace("patch_embedding", PATCH_EMBEDDING): p for name, p in named.items()}

    @torch.no_grad()
    def load_trainables(self, state: Mapping[str, Tensor]) -> ConcatenatedViT:
        """Copies tensors by name; both sides must hold the same names and shapes."""
        own = self.trainables()
        if own.keys() != state.keys():
            raise KeyError(f"trainable tensors differ: here {sorted(own)}, given {sorted(state)}")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name}: shape {tuple(state[name].shape)}, wanted {tuple(parameter.shape)}")
            parameter.copy_(state[name])
        return self.to(next(self.vit.parameters()).device)  # where the backbone is

    def forward(self, images: Tensor) -> Tensor:
        x, ropes = self.embed(images)  # (B, prefix + patches, d)
        held = 0  # how many prompts stand in the sequence now, right after the prefix tokens
        for i, block in enumerate(self.vit.blocks):
            attention: AbstractContextManager[None] = nullcontext()
            if i in self.layers and self.is_key_value:
                attention = attending_to(*self.keys_and_values(x, i))
            elif i in self.layers:
                x, held = self.with_prompts(x, held, i)
            elif self.after_prompts == "drop":
                x, held = self.without_prompts(x, held), 0
            with attention:
                if isinstance(self.vit, Eva):
                    # timm turns what stands behind the prefix tokens; prompts have no position either
                    block.attn.num_prefix_tokens = self.vit.num_prefix_tokens + held
                    x = block(x, rope=ropes[i])
                elif isinstance(self.vit, Beit):
                    x = block(x, shared_rel_pos_bias=self.bias_of(x, i, held))
                else:
                    x = block(x)
        x = self.vit.fc_norm(self.pool(self.vit.norm(x), held))  # (B, d)
        return self.head(x.to(self.head.weight.dtype))

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Tokens as they enter the first block, without prompts of their own: (B, prefix + patches, d), and
        what each block takes as rotary positions."""
        proj = self.patch_embedding if self.location == "concat-channel" else self.vit.patch_embed.proj
        images = images.to(proj.weight.dtype)
        if self.location == "pad":
            m = self.num_border
            mean = images.new_tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
            std = images.new_tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
            top_bottom = ((self.prompts.to(images) - mean) / std).expand(len(images), -1, -1, -1)
            sides = ((self.prompts_sides.to(images) - mean) / std).expand(len(images), -1, -1, -1)
            images = torch.cat([sides[..., :m], images, sides[..., m:]], dim=3)
            images = torch.cat([top_bottom[:, :, :m], images, top_bottom[:, :, m:]], dim=2)
        if self.location == "concat-channel":
            channels = torch.cat([images, self.prompts.expand(len(images), -1, -1, -1).to(images)], dim=1)
            patches = proj(channels).flatten(2).transpose(1, 2)  # (B, patches, d)
            x = self.vit.patch_embed.norm(patches)
            if getattr(self.vit, "dynamic_img_size", False):
                x = x.unflatten(1, self.vit.patch_embed.grid_size)
        else:
            x = self.vit.patch_embed(images)
        depth = len(self.vit.blocks)
        if isinstance(self.vit, Beit):
            x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], dim=1)
            return (x if self.vit.pos_embed is None else x + self.vit.pos_embed), [None] * depth
        if isinstance(self.vit, Eva):
            x, rope = self.vit._pos_embed(x)
            return self.vit.norm_pre(x), rope if self.vit.rope_mixed else [rope] * depth
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(x))), [None] * depth

    def with_prompts(self, x: Tensor, held: int, block: int) -> tuple[Tensor, int]:
        if self.location in ("pad", "concat-channel"):  # they entered with the image
            return x, 0
        if self.location == "prepend-pixel":
            embed = self.vit.patch_embed
            strip = embed.proj(self.prompts.to(x.dtype)).flatten(2).transpose(1, 2)  # (1, m, d), no position
            prompts = getattr(self.vit, "norm_pre", nn.Identity())(embed.norm(strip))
        else:
            prompts = self.set_of(x, block)
        if self.location in ("add", "add-1"):
            return x + prompts, 0
        prefix = self.vit.num_prefix_tokens
        x = self.without_prompts(x, held)
        x = torch.cat([x[:, :prefix], prompts.expand(len(x), -1, -1), x[:, prefix:]], dim=1)
        return x, prompts.shape[1]

    def set_of(self, x: Tensor, block: int) -> Tensor:
        """The block's own prompts, in the dtype of the tokens x: (1 or B, m, width)."""
        index = 0 if self.shared else self.layers.index(block)
        prompts = self.prompts[index].unsqueeze(0)
        if hasattr(self, "prompt_projection"):
            prompts = self.prompt_projection(prompts)
        if self.dropout_per == "image":
            prompts = prompts.expand(len(x), -1, -1)
        return F.dropout(prompts, self.dropout, self.training).to(x.dtype)

    def keys_and_values(self, x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The block's own keys and values, (B, H, m, D) each."""
        prompts = self.set_of(x, block).expand(len(x), -1, -1)
        keys, values = prompts.unflatten(-1, (2, *self.heads)).transpose(1, 3).unbind(2)
        return keys, values

    def bias_of(self, x: Tensor, block: int, held: int) -> Tensor | None:
        """The block's bias for the sequence x with prompts, which have no position: zero for them."""
        bias = self.biases[block]
        if bias is None:
            return None
        bias = bias.to(x)
        prefix = self.vit.num_prefix_tokens
        for dim in (1, 2):
            before, behind = bias.split((prefix, bias.shape[dim] - prefix), dim)
            shape = list(bias.shape)
            shape[dim] = held
            bias = torch.cat([before, bias.new_zeros(shape), behind], dim)
        return bias

    def without_prompts(self, x: Tensor, held: int) -> Tensor:
        prefix = self.vit.num_prefix_tokens
        return torch.cat([x[:, :prefix], x[:, prefix + held :]], dim=1)

    def pool(self, x: Tensor, held: int) -> Tensor:
        prefix = self.vit.num_prefix_tokens
        if self.is_distilled:  # for timm's two heads, side by side in one, whose logits are averaged
            return torch.cat([x[:, 0], x[:, 1]], dim=1) / 2
        if self.pool_type is None and isinstance(self.vit, Beit):
            x = self.without_prompts(x, held)
            return x[:, prefix:].mean(dim=1) if self.vit.global_pool == "avg" else x[:, 0]
        if self.pool_type is None:
            return self.vit.pool(self.without_prompts(x, held))
        if self.pool_type == "cls":
            return x[:, 0]
        if self.pool_type == "image":
            return x[:, prefix + held :].mean(dim=1)
        if self.pool_type == "prompts":
            return x[:, prefix : prefix + held].mean(dim=1)
        if self.pool_type == "image_and_prompts":
            return x[:, prefix:].mean(dim=1)
        raise ValueError(f"pool: {self.pool_type!r}")


def take_bias(attention: nn.Module) -> Tensor | None:
    """The relative position bias (H, N, N) of a Beit's attention, which then adds none of its own."""
    if attention.relative_position_bias_table is None:
        return None
    bias = attention._get_rel_pos_bias().squeeze(0)
    attention.relative_position_bias_table = None
    return bias


@contextmanager
def attending_to(keys: Tensor, values: Tensor) -> Iterator[None]:
    """Inside, timm's attention runs once, with these keys and values (B, H, m, D) before the tokens' own."""
    plain = F.scaled_dot_product_attention

    def extended(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: float
    ) -> Tensor:
        mask = None if attn_mask is None else F.pad(attn_mask, (keys.shape[2], 0))
        k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        return plain(q, k, v, attn_mask=mask, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=extended) as attention:
        yield
    attention.assert_called_once()


@dataclass(frozen=True)
class Step:
    """What one pass gave: logits (B, classes), the mean cross-entropy, gradients by parameter name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names that PromptedViT uses."""
    if isinstance(model, ConcatenatedViT):
        return model.trainables()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Runs one forward and backward pass from cleared gradients; every trainable parameter must get one."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {}
    for name, parameter in trainables(model).items():
        if parameter.grad is None:
            raise AssertionError(f"{name} got no gradient")
        gradients[name] = parameter.grad.detach().clone()
    return Step(logits.detach(), loss.detach(), gradients)


def assert_same_step(
    actual: Step, expected: Step, tolerance: float, of_gradients: float | None = None
) -> None:
    """Equal to within a tolerance relative to each tensor's norm; that of gradients may be another."""
    assert relative_error(actual.logits, expected.logits) <= tolerance, "logits"
    assert relative_error(actual.loss, expected.loss) <= tolerance, "loss"
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = relative_error(actual.gradients[name], gradient)
        assert error <= (tolerance if of_gradients is None else of_gradients), f"gradient of {name}"


def assert_same_gradients(model: nn.Module, expected: Step, tolerance: float) -> None:
    """The same of the gradients that a backward pass has left on a model's parameters."""
    for name, gradient in expected.gradients.items():
        assert relative_error(model.get_parameter(name).grad, gradient) <= tolerance, f"gradient of {name}"


def training_steps(models: Sequence[nn.Module], images: Tensor, labels: Tensor) -> list[Step]:
    """A step of each, in training mode, on the same random numbers: each draws one dropout mask a set of
    prompts, in order."""
    steps = []
    for model in models:
        torch.manual_seed(0)
        steps.append(step(model.train(), images, labels))
    return steps


def image_by_image(plain: nn.Module, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Logits of a definition that is called with each image and its own prompts: for every tensor of the
    definition's prompts one (B, *shape)."""
    names = [name for name, _ in plain.named_parameters() if name.split(".")[0] == "prompts"]
    rows = []
    for index, image in enumerate(images):
        of_image = {name: given[index] for name, given in zip(names, prompts, strict=True)}
        rows.append(torch.func.functional_call(plain, of_image, (image.unsqueeze(0),)))
    return torch.cat(rows)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; 0 where both are exactly zero."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return 0.0 if difference == 0 else float(difference / expected.detach().double().norm())
