"""Whole models on the Triton kernels, in the interpreter, against concatenation in float64."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from concatenation import ConcatenatedViT, image_by_image, relative_error
from low_precision import assert_no_worse_than_concatenation, vits
from tiny import random_batch, tiny_beit, tiny_eva, tiny_vit
from vpt_fast.kernels.dispatch import Backend, Ops

from vpt_fast import PromptedViT
from vpt_fast.engine.policy import POLICIES

pytestmark = pytest.mark.usefixtures("nan_empty")

CLASSES = 5
DEEP = dict(num_prompts=7)
SETTINGS = {
    "deep": DEEP,
    "shallow": dict(num_prompts=7, prompt_type="shallow"),
    "image_and_prompt_pool": dict(num_prompts=3, pool="image_and_prompts"),
    "first_drop": dict(num_prompts=7, prompt_layers=1, after_prompts="drop"),
    "last_one": dict(num_prompts=7, prompt_layers=-1),
    "key_value": dict(num_prompts=7, prompt_location="key-value"),
    "add": dict(prompt_location="add"),
}
BACKBONES = {
    "qk_norm": dict(qk_norm=True),
    "norms_inside": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "rms_norm_and_swiglu": dict(norm_layer="rmsnorm", mlp_layer="swiglu"),
    "average_pool_without_cls": dict(class_token=False, global_pool="avg"),
    "rows_narrower_than_their_tiles": dict(embed_dim=144, num_heads=2),  # the head dim of SO400M, 72
}


def backbone(**arguments):
    from timm.layers import GluMlp, RmsNorm
    from torch import nn

    if arguments.pop("mlp_layer", None):
        arguments |= dict(mlp_layer=lambda *a, **k: GluMlp(*a, **k, gate_last=False), act_layer=nn.SiLU)
    if arguments.pop("norm_layer", None):
        arguments |= dict(norm_layer=RmsNorm)
    return tiny_vit(depth=2, **arguments)


DINOV3 = dict(rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2, dynamic_img_size=True)
EVAS = {
    "dinov3_shallow": (DINOV3, SETTINGS["shallow"]),
    "eva02_deep": (dict(swiglu_mlp=True, scale_mlp=True, qkv_fused=False), DEEP),
    "mixed_with_qk_norm_deep": (dict(rope_type="mixed", attn_type="rope", qk_norm=True), DEEP),
}


def gradients(model, images) -> dict[str, torch.Tensor]:
    logits = model(images)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits))
    return {
        "logits": logits.detach(),
        **{name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


def errors(vit, settings: dict, memory: str = "exact", backend: str = "triton") -> dict[str, float]:
    """Relative errors of logits and gradients, by name."""
    model = PromptedViT(vit.float(), CLASSES, backend=backend, memory=memory, **settings).train()
    plain = ConcatenatedViT(vit.double(), CLASSES, **settings).double()
    plain.load_trainables(model.trainable_state_dict())
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    actual, expected = gradients(model, images), gradients(plain, images.double())
    return {name: relative_error(actual[name], exact) for name, exact in expected.items()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_concatenation(settings: dict) -> None:
    assert max(errors(backbone(), settings).values()) < 2e-5


@pytest.mark.parametrize("arguments", BACKBONES.values(), ids=BACKBONES)
def test_variant_of_the_backbone_equals_concatenation(arguments: dict) -> None:
    assert max(errors(backbone(**arguments), DEEP).values()) < 2e-5


@pytest.mark.parametrize(("arguments", "settings"), EVAS.values(), ids=EVAS)
def test_rotary_backbone_equals_concatenation(arguments: dict, settings: dict) -> None:
    assert max(errors(tiny_eva(depth=2, **arguments), settings).values()) < 2e-5


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("setting", ["deep", "shallow", "image_and_prompt_pool", "key_value"])
def test_backbone_with_relative_position_bias_equals_concatenation(setting: str, memory: str) -> None:
    beit = tiny_beit(depth=2, num_heads=1)  # head dim 32: those of kernels in windows are 32 and 64
    tolerance = 5e-2 if memory == "compact" else 2e-5
    assert max(errors(beit, SETTINGS[setting], memory).values()) < tolerance


@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize(
    "settings",
    [DEEP, SETTINGS["image_and_prompt_pool"], SETTINGS["key_value"]],
    ids=["deep", "prompt_pool", "key_value"],
)
def test_prompts_that_are_each_image_s_own_equal_concatenation(settings: dict, memory: str) -> None:
    vit = backbone()
    model = PromptedViT(vit.float(), CLASSES, backend="triton", memory=memory, **settings)
    plain = ConcatenatedViT(vit.double(), CLASSES, **settings).double()
    plain.load_trainables(model.trainable_state_dict())
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    prompts = torch.randn(2, *model.prompts.shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = prompts.requires_grad_(), prompts.detach().double().requires_grad_()
    actual, expected = model(images, ours), image_by_image(plain, images.double(), [theirs])
    assert relative_error(actual, expected) < 2e-5
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual.backward(weights.float())
    expected.backward(weights)
    assert relative_error(ours.grad, theirs.grad) < (2e-2 if memory == "compact" else 2e-5)


STRIDES = {  # of the prompts of 2 images, from sets, m and width
    "transposed": lambda sets, m, width: torch.randn(2, width, m, sets).transpose(1, 3),
    "expanded": lambda sets, m, width: torch.randn(2, sets, m, 1).expand(-1, -1, -1, width),
    "sliced": lambda sets, m, width: torch.randn(2, sets, m, width + 3)[..., 1:-2],
}


@pytest.mark.parametrize("given", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("name", ["deep", "shallow", "key_value"])
def test_given_prompts_of_any_strides_are_taken(name: str, given) -> None:
    model = PromptedViT(backbone().float(), CLASSES, backend="triton", **SETTINGS[name])
    images = random_batch(model, 2, CLASSES, torch.float32)[0]
    strided = given(*model.prompts.shape).requires_grad_()
    plain = strided.detach().contiguous().requires_grad_()
    actual, expected = model(images, prompts=strided), model(images, prompts=plain)
    assert torch.equal(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    (ours,) = torch.autograd.grad(actual, strided, weights)
    (theirs,) = torch.autograd.grad(expected, plain, weights)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["deep", "key_value"])
def test_a_tensor_for_each_set_gives_the_gradients_of_the_plain_operations(name: str) -> None:
    vit, sets, found = backbone().float(), [], []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = PromptedViT(vit, CLASSES, backend=backend, **SETTINGS[name])
        num_sets, _, width = model.prompts.shape
        sets = sets or [torch.randn(*[2] * (i % 2), 3 + 4 * i, width) for i in range(num_sets)]
        given = [prompts.clone().requires_grad_() for prompts in sets]
        logits = model(random_batch(model, 2, CLASSES, torch.float32)[0], prompts=given)
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        found.append(torch.autograd.grad(logits, given, weights))
    for expected, actual in zip(*found, strict=True):
        assert relative_error(actual, expected.double()) < 2e-5


DECODERS = {  # what a gradient's strides come from: patches (B, P, d) to a number
    "transposed": lambda x: x.transpose(1, 2).unflatten(2, (4, 4)).contiguous().square().sum(),
    "expanded": lambda x: x.sum(),
    "expanded_over_channels": lambda x: x.sum(-1).square().sum(),
}


@pytest.mark.parametrize("backend", ["triton", "triton_fused_mlp"])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_gradient_of_any_strides_is_taken(decoder, backend: str) -> None:
    vit = backbone().float()
    found = []
    for name in (backend, "torch"):
        torch.manual_seed(0)
        model = PromptedViT(vit, CLASSES, 3, backend=name)
        images = random_batch(model, 2, CLASSES, torch.float32)[0]
        decoder(model.patch_tokens(images, [0, 1])[1]).backward()
        found.append(model.prompts.grad)
    assert relative_error(*found) < 2e-5


def test_forward_mode_differentiation_is_refused() -> None:
    model = PromptedViT(backbone().float(), CLASSES, 3, backend="triton").requires_grad_(False)
    images = random_batch(model, 1, CLASSES, torch.float32)[0]
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward-mode.*want backend='torch'"):
        model(fwAD.make_dual(images, torch.ones_like(images)))


@pytest.mark.filterwarnings("ignore")  # that torch.jit.trace is deprecated
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(backend="triton"), "backend='triton'.* 'auto' or 'torch'"),
        (dict(backend="triton_fused_mlp"), "backend='triton_fused_mlp'.* 'auto' or 'torch'"),
        (dict(backend="torch", attention="sdpa_cpu"), "attention='sdpa_cpu'.* 'auto'"),
    ],
    ids=["triton", "triton_fused_mlp", "sdpa_cpu"],
)
@torch.no_grad()
def test_file_for_other_programs_never_holds_this_packages_operators(settings: dict, message: str) -> None:
    model = PromptedViT(backbone().float(), CLASSES, 3, **settings).eval()
    images = random_batch(model, 1, CLASSES, torch.float32)[0]
    with pytest.raises(ValueError, match=message):
        torch.export.export(model, (images,))
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(model, images)


EXACT = [name for name, policy in POLICIES.items() if not policy.compact]


@pytest.mark.parametrize("memory", EXACT[1:])
def test_recomputing_is_exact(memory: str) -> None:
    assert max(errors(backbone(), DEEP, memory).values()) < 2e-5


@pytest.mark.parametrize("backend", ["triton", "triton_fused_mlp"])
def test_compact_gradients_carry_the_codes_rounding_alone(backend: str) -> None:
    found = errors(backbone(), DEEP, "compact", backend)
    assert found.pop("logits") < 2e-5  # forward is exact
    assert max(found.values()) < 2e-2


@pytest.mark.parametrize("memory", EXACT)
def test_fused_mlp_equals_concatenation(memory: str) -> None:
    assert max(errors(backbone(), DEEP, memory, "triton_fused_mlp").values()) < 2e-5


def test_fused_mlp_with_a_norm_inside_equals_concatenation() -> None:
    vit = tiny_eva(depth=2, scale_mlp=True, **DINOV3)
    assert max(errors(vit, DEEP, backend="triton_fused_mlp").values()) < 2e-5


@pytest.mark.parametrize("arguments", [{}, dict(mlp_layer="swiglu")], ids=["gelu", "gated"])
def test_products_hold_the_activation_where_that_pays_and_it_is_not_gated(
    arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def fused(
        self: Backend, device: object, dtype: object, head_dim: int, in_windows: bool, is_gated: bool
    ) -> Ops:
        assert self.fused is not None
        if is_gated:
            return self.cuda
        backward = self.fused.linear_activate_backward
        return self.fused._replace(
            linear_activate_backward=lambda *given: calls.append(given) or backward(*given)
        )

    monkeypatch.setattr(Backend, "ops", fused)
    assert max(errors(backbone(**dict(arguments)), DEEP).values()) < 2e-5
    assert bool(calls) == (not arguments)


@pytest.mark.parametrize("backend", ["triton", "triton_fused_mlp", "torch"])
def test_model_says_whether_it_runs_kernels(backend: str) -> None:
    model = PromptedViT(backbone().float(), CLASSES, 7, backend=backend)
    assert model.runs_kernels(torch.device("cpu")) == (backend != "torch")


def test_fused_mlp_refuses_a_gated_activation() -> None:
    with pytest.raises(ValueError, match="backend='triton_fused_mlp': .*gated activation 'swiglu'"):
        PromptedViT(backbone(mlp_layer="swiglu").float(), CLASSES, 7, backend="triton_fused_mlp")


@pytest.mark.parametrize("backend", ["triton", "triton_fused_mlp"])
def test_head_dim_that_kernels_do_not_take_is_refused(backend: str) -> None:
    vit = tiny_vit(torch.float32, num_heads=4)
    with pytest.raises(ValueError, match=f"backend='{backend}': got a backbone with head dim 8, want one"):
        PromptedViT(vit, CLASSES, 7, backend=backend)


def test_head_dim_is_no_matter_where_another_attention_takes_the_kernels_place() -> None:
    vit = tiny_vit(torch.float32, num_heads=4)
    model = PromptedViT(vit, CLASSES, 7, backend="triton", attention="sdpa_cpu")
    assert model(random_batch(model, 1, CLASSES, torch.float32)[0]).isfinite().all()


def test_head_dim_that_the_rotation_does_not_take_is_refused_whatever_attention_is() -> None:
    eva = tiny_eva(torch.float32, num_heads=4)
    with pytest.raises(ValueError, match="backend='triton': .*head dim 8 and rotary positions, want one of"):
        PromptedViT(eva, CLASSES, 7, backend="triton", attention="sdpa_cpu")


def test_float64_model_may_be_built_for_kernels_and_converted_later() -> None:
    model = PromptedViT(backbone(), CLASSES, 7, backend="triton").float()
    assert model(random_batch(model, 1, CLASSES, torch.float32)[0]).isfinite().all()


def test_fused_mlp_never_forms_the_gradient_of_the_activation(monkeypatch) -> None:
    from vpt_fast.kernels.mlp import ops

    def refuse(*args: object) -> None:
        raise AssertionError("a pass of its own over the activation")

    monkeypatch.setattr(ops, "_activate", refuse)
    monkeypatch.setattr(ops, "_activate_backward", refuse)
    model = PromptedViT(backbone().float(), CLASSES, 7, backend="triton_fused_mlp").train()
    gradients(model, random_batch(model, 2, CLASSES, torch.float32)[0])


@pytest.mark.parametrize(
    ("name", "backend"), [("deep", "triton"), ("deep", "triton_fused_mlp"), ("shallow", "triton")]
)
def test_error_in_bfloat16_is_at_most_that_of_concatenation(name: str, backend: str) -> None:
    case = dict(device="cpu", dtype=torch.bfloat16, backend=backend, batch_size=2, **SETTINGS[name])
    assert_no_worse_than_concatenation(vits, 2, **case)


def test_dropout_per_image_equals_the_plain_operations() -> None:
    vit = backbone().float()
    images = random_batch(PromptedViT(vit, CLASSES, 7), 2, CLASSES, torch.float32)[0]
    found = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = PromptedViT(vit, CLASSES, 7, prompt_dropout=0.5, backend=backend).train()
        torch.manual_seed(1)
        found.append(gradients(model, images))
    for name, expected in found[0].items():
        assert relative_error(found[1][name], expected.double()) < 2e-5, name


@pytest.mark.parametrize(
    ("vit", "image_size"),
    [(backbone, (32, 32)), (lambda: tiny_eva(depth=1, **DINOV3), (16, 48))],
    ids=["vit", "rotary_at_another_image_size"],
)
def test_compiles_without_a_graph_break(vit, image_size: tuple[int, int]) -> None:
    model = PromptedViT(vit().float(), CLASSES, 7, backend="triton").train()
    images = torch.randn(2, 3, *image_size)
    eager = gradients(model, images)
    model.zero_grad()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), images)
    for name, expected in eager.items():
        actual = compiled[name if name == "logits" else f"_orig_mod.{name}"]
        assert relative_error(actual, expected) < 1e-5, name
