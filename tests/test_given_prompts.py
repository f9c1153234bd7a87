"""Prompts that a caller passes in place of the model's own, the same for all images or each image's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from concatenated_swin import ConcatenatedSwin
from concatenation import ConcatenatedViT, image_by_image, relative_error
from tiny import random_batch, tiny_beit, tiny_eva, tiny_swin, tiny_vit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import vpt_fast
from vpt_fast import PromptedSwin, PromptedViT
from vpt_fast.engine.policy import MEMORY

CLASSES, BATCH = 5, 3
TOLERANCE = 1e-9  # relative, in float64


def own_prompts(model: PromptedViT | PromptedSwin) -> list[nn.Parameter]:
    return list(model.prompts) if isinstance(model, PromptedSwin) else [model.prompts]


def random_prompts(model: PromptedViT | PromptedSwin, *batch: int, seed: int = 5) -> list[Tensor]:
    """For each tensor of the model's own prompts, one to pass, with `batch` in front of its shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*batch, *own.shape, generator=generator, dtype=torch.float64).to(own).requires_grad_()
        for own in own_prompts(model)
    ]


def call(model: PromptedViT | PromptedSwin, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    return model(images, prompts=prompts if isinstance(model, PromptedSwin) else prompts[0])


def gradients(logits: Tensor, model: nn.Module, *others: Tensor) -> list[Tensor]:
    """Of a loss that weighs every image's logits differently: of the head's weight, and of others."""
    weights = torch.linspace(-1, 1, BATCH * CLASSES, dtype=logits.dtype).view(BATCH, CLASSES)
    return list(torch.autograd.grad((logits * weights).sum(), (model.head.weight, *others)))


VIT: dict[str, dict[str, Any]] = {
    "deep": dict(num_prompts=4),
    "deep_prompt_pool": dict(num_prompts=4, pool="prompts"),
    "shallow": dict(num_prompts=4, prompt_type="shallow"),
    "shallow_prompt_pool": dict(num_prompts=4, prompt_type="shallow", pool="prompts"),
    "gap": dict(num_prompts=4, prompt_layers=[0, 2]),
    "gap_drop": dict(num_prompts=4, prompt_layers=[1], after_prompts="drop"),
    "shared": dict(num_prompts=4, prompt_shared=True),
    "projected": dict(num_prompts=4, prompt_project=6),
    "key-value": dict(num_prompts=4, prompt_location="key-value"),
    "key-value_projected": dict(num_prompts=4, prompt_location="key-value", prompt_project=6),
    "add": dict(prompt_location="add"),
    "add-1": dict(prompt_location="add-1", prompt_layers=[0, 2]),
}
SWIN: dict[str, dict[str, Any]] = {
    "swin": dict(num_prompts=4),
    "swin_shallow": dict(num_prompts=4, prompt_type="shallow"),
}


OTHERS = {"eva": tiny_eva, "beit": tiny_beit}


def pair(name: str, **others: Any) -> tuple[PromptedViT | PromptedSwin, nn.Module]:
    """A model in float64 and its definition, with the same random head (and projection)."""
    model: PromptedViT | PromptedSwin
    plain: ConcatenatedViT | ConcatenatedSwin
    if name in SWIN:
        swin = tiny_swin()
        model = PromptedSwin(swin, CLASSES, **SWIN[name], **others).double()
        plain = ConcatenatedSwin(swin, CLASSES, **SWIN[name]).double()
    else:
        vit = OTHERS.get(name, tiny_vit)()
        settings = VIT["deep" if name in OTHERS else name]
        model = PromptedViT(vit, CLASSES, **settings, **others).double()
        plain = ConcatenatedViT(vit, CLASSES, **settings).double()
    return model, plain.load_trainables(model.trainable_state_dict())


@pytest.mark.parametrize("name", [*VIT, *OTHERS, *SWIN])
def test_each_image_s_own_equal_concatenation_image_by_image(name: str) -> None:
    model, plain = pair(name)
    images, _ = random_batch(model, BATCH)
    prompts = random_prompts(model, BATCH)
    actual, expected = call(model, images, prompts), image_by_image(plain, images, prompts)
    assert relative_error(actual, expected) < TOLERANCE, "logits"
    found = zip(gradients(actual, model, *prompts), gradients(expected, plain, *prompts), strict=True)
    for index, (ours, wanted) in enumerate(found):
        assert relative_error(ours, wanted) < TOLERANCE, f"gradient {index}"


@pytest.mark.parametrize("memory", [name for name in MEMORY if name not in ("auto", "compact")])
@pytest.mark.parametrize("name", ["deep", "shallow_prompt_pool", "key-value", "swin"])
def test_policies_give_the_same_gradients(name: str, memory: str) -> None:
    model, plain = pair(name, memory=memory)
    images, _ = random_batch(model, BATCH)
    prompts = random_prompts(model, BATCH)
    actual = gradients(call(model, images, prompts), model, *prompts)
    expected = gradients(image_by_image(plain, images, prompts), plain, *prompts)
    for ours, wanted in zip(actual, expected, strict=True):
        assert relative_error(ours, wanted) < TOLERANCE


@pytest.mark.parametrize("memory", [name for name in MEMORY if name not in ("auto", "compact")])
@pytest.mark.parametrize("name", ["gap", "key-value"])
def test_policies_give_the_same_gradients_of_a_tensor_for_each_set(name: str, memory: str) -> None:
    model, plain = pair(name, memory=memory)
    images, _ = random_batch(model, BATCH)
    sets = sets_of_other_lengths(model, (False, True, True))
    actual = gradients(model(images, prompts=sets), model, *sets)
    expected = gradients(sets_image_by_image(plain, images, sets), plain, *sets)
    for ours, wanted in zip(actual, expected, strict=True):
        assert relative_error(ours, wanted) < TOLERANCE


LENGTHS = (2, 7, 5)  # of the blocks' prompts
IN_ATTENTION = [name for name in VIT if not name.startswith("add")]


def sets_of_other_lengths(model: PromptedViT, per_image: Sequence[bool]) -> list[Tensor]:
    """For each of the model's sets one to pass, with each image's own prompts or the same for all."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(*([BATCH] * own), m) for own, m in zip(per_image, LENGTHS, strict=True)]
    num_sets, _, width = model.prompts.shape
    return [
        torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        .to(model.prompts)
        .requires_grad_()
        for shape in shapes[:num_sets]
    ]


def sets_image_by_image(plain: nn.Module, images: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """Logits of a definition that is called with each image and its sets of prompts."""
    del plain.prompts
    rows = []
    for index, image in enumerate(images):
        plain.prompts = [prompts[index] if prompts.dim() == 3 else prompts for prompts in sets]
        rows.append(plain(image.unsqueeze(0)))
    return torch.cat(rows)


@pytest.mark.parametrize("per_image", [(False, True, True), (True, False, False)], ids=str)
@pytest.mark.parametrize("name", [*IN_ATTENTION, "eva"])
def test_a_tensor_for_each_set_of_any_length_equals_concatenation(name: str, per_image: list[bool]) -> None:
    model, plain = pair(name)
    images, _ = random_batch(model, BATCH)
    sets = sets_of_other_lengths(model, per_image)
    actual, expected = model(images, prompts=sets), sets_image_by_image(plain, images, sets)
    assert relative_error(actual, expected) < TOLERANCE, "logits"
    found = zip(gradients(actual, model, *sets), gradients(expected, plain, *sets), strict=True)
    for index, (ours, wanted) in enumerate(found):
        assert relative_error(ours, wanted) < TOLERANCE, f"gradient {index}"


@pytest.mark.parametrize("memory", [name for name in MEMORY if name not in ("auto", "compact")])
@pytest.mark.parametrize("trained", [(True, False, True), (False, True, False)], ids=str)
def test_a_tensor_for_each_set_of_which_some_are_not_trained(trained: tuple[bool, ...], memory: str) -> None:
    model, plain = pair("deep", memory=memory)
    images, _ = random_batch(model, BATCH)
    sets = sets_of_other_lengths(model, (False, True, True))
    for given, is_trained in zip(sets, trained, strict=True):
        given.requires_grad_(is_trained)
    wanted = [given for given in sets if given.requires_grad]
    actual, expected = model(images, prompts=tuple(sets)), sets_image_by_image(plain, images, sets)
    found = zip(gradients(actual, model, *wanted), gradients(expected, plain, *wanted), strict=True)
    for ours, theirs in found:
        assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name", ["add", "add-1"])
def test_a_tensor_for_each_set_that_is_added_gives_what_one_for_all_gives(name: str) -> None:
    model, _ = pair(name)
    images, _ = random_batch(model, BATCH)
    (prompts,) = random_prompts(model)
    assert torch.equal(model(images, prompts=list(prompts)), model(images, prompts=prompts))
    with pytest.raises(ValueError, match=r"prompts.0: got shape \(2, 32\), want"):
        model(images, prompts=[prompts[0][:1].expand(2, -1)] * len(prompts))


@pytest.mark.parametrize("name", [*VIT, *OTHERS, *SWIN])
def test_the_model_s_own_when_passed_give_what_they_give_as_its_own(name: str) -> None:
    model, _ = pair(name)
    images, _ = random_batch(model, BATCH)
    own = own_prompts(model)
    actual, expected = call(model, images, own), model(images)
    assert torch.equal(actual, expected)
    for ours, wanted in zip(gradients(actual, model, *own), gradients(expected, model, *own), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", ["deep", "swin"])
def test_they_are_trained_beside_frozen_prompts_of_the_model(name: str) -> None:
    model, _ = pair(name)
    for own in own_prompts(model):
        own.requires_grad_(False)
    images, labels = random_batch(model, BATCH)
    prompts = random_prompts(model, BATCH)
    F.cross_entropy(call(model, images, prompts), labels).backward()
    assert all(given.grad is not None and given.grad.abs().amax(dim=(1, 2, 3)).all() for given in prompts)
    assert all(own.grad is None for own in own_prompts(model))


def test_every_result_of_a_vit_takes_them() -> None:
    """Each image's results are those of a model that has its prompts."""
    model, _ = pair("deep")
    images, _ = random_batch(model, BATCH)
    (prompts,) = random_prompts(model, BATCH)
    calls = {
        "image_features": lambda images, **given: model.image_features(images, **given),
        "forward_features": lambda images, **given: model.forward_features(images, **given),
        "patch_tokens": lambda images, **given: model.patch_tokens(images, [1], **given)[0],
        "attention_maps": lambda images, **given: model.attention_maps(images, [1], **given)[0],
    }
    together = {name: run(images, prompts=prompts) for name, run in calls.items()}
    for index, image in enumerate(images):
        with torch.no_grad():
            model.prompts.copy_(prompts[index])
        for name, run in calls.items():
            assert relative_error(together[name][index], run(image.unsqueeze(0))[0]) < TOLERANCE, name


def test_a_swin_s_features_take_them() -> None:
    model, _ = pair("swin")
    images, _ = random_batch(model, BATCH)
    prompts = random_prompts(model, BATCH)
    together = model.forward_features(images, prompts=prompts)
    for index, image in enumerate(images):
        with torch.no_grad():
            for own, given in zip(model.prompts, prompts, strict=True):
                own.copy_(given[index])
        assert relative_error(together[index], model.forward_features(image.unsqueeze(0))[0]) < TOLERANCE


def test_gradient_goes_on_to_what_the_prompts_were_computed_from() -> None:
    """Prompts chosen from a pool by weights that depend on the image, as in Learning to Prompt."""
    model, plain = pair("shallow_prompt_pool")
    images, _ = random_batch(model, BATCH)
    pool = torch.randn(7, *model.prompts.shape, dtype=torch.float64, requires_grad=True)
    key = torch.randn(3 * 32 * 32, 7, dtype=torch.float64, requires_grad=True)

    def chosen() -> Tensor:
        return torch.einsum("bp,psmd->bsmd", (images.flatten(1) @ key / 50).softmax(dim=1), pool)

    actual = gradients(model(images, prompts=chosen()), model, pool, key)
    expected = gradients(image_by_image(plain, images, [chosen()]), plain, pool, key)
    for ours, wanted in zip(actual, expected, strict=True):
        assert relative_error(ours, wanted) < TOLERANCE


@pytest.mark.parametrize("strides", ["expanded", "transposed", "16 bits"])
def test_prompts_of_other_strides_or_fewer_bits_are_those_values(strides: str) -> None:
    model = PromptedViT(tiny_vit(torch.float32), CLASSES, 4)
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    sets, m, d = model.prompts.shape
    given = {
        "expanded": lambda: torch.randn(sets, m, d).expand(BATCH, -1, -1, -1),
        "transposed": lambda: torch.randn(BATCH, d, m, sets).transpose(1, 3),
        "16 bits": lambda: torch.randn(BATCH, sets, m, d).bfloat16(),
    }[strides]().requires_grad_()
    plain = given.detach().float().contiguous().requires_grad_()
    actual, expected = model(images, prompts=given), model(images, prompts=plain)
    assert torch.equal(actual, expected)
    ours, wanted = gradients(actual, model, given)[1], gradients(expected, model, plain)[1]
    assert torch.equal(ours, wanted.to(ours.dtype))


@pytest.mark.parametrize("per", ["image", "batch"])
def test_dropout_masks_them_as_it_says(per: str) -> None:
    """Prompts of ones, whose keys and values tell nothing but which elements were dropped."""
    model = PromptedViT(tiny_vit(), CLASSES, 4, prompt_dropout=0.5, prompt_dropout_per=per).double().train()
    seen = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[1]))
    images, _ = random_batch(model, BATCH)
    model(images, prompts=torch.ones(BATCH, *model.prompts.shape, dtype=torch.float64))
    (masked,) = seen
    assert set(masked.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(masked[0], masked[1]) == (per == "batch")


def test_auto_leaves_room_for_each_image_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedViT(tiny_vit(torch.float32), CLASSES, 50, memory="auto")
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    needed = sum(model.estimate_training_bytes(BATCH)[part] for part in ("kept", "workspace"))
    monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device: int(1.2 * needed))
    used = []
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda block, inputs: used.append(inputs[3].recompute_block))
    model(images)
    model(images, prompts=random_prompts(model)[0])
    model(images, prompts=random_prompts(model, BATCH)[0])
    assert used == [False] * 6 + [True] * 3
    used.clear()
    few, many = torch.randn(5, 32), torch.randn(BATCH, 200, 32)
    model(images, prompts=[few, few, few])
    model(images, prompts=[few, few, many])
    assert used == [False] * 3 + [True] * 3


def test_they_are_an_input_of_an_exported_program() -> None:
    model = PromptedViT(tiny_vit(torch.float32), CLASSES, 4).eval()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    (prompts,) = random_prompts(model, BATCH)
    batch = torch.export.Dim("batch", max=64)
    shapes = {"images": {0: batch}, "prompts": {0: batch}}
    with torch.no_grad():
        exported = torch.export.export(model, (images, prompts.detach()), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(images, prompts), model(images, prompts))
        torch.testing.assert_close(exported(images[:2], prompts[:2]), model(images[:2], prompts[:2]))


def test_a_tensor_for_each_set_is_an_input_of_an_exported_program() -> None:
    model = PromptedViT(tiny_vit(torch.float32), CLASSES, 4).eval()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    sets = [prompts.detach() for prompts in sets_of_other_lengths(model, (False, True, True))]
    batch = torch.export.Dim("batch", max=64)
    shapes = {"images": {0: batch}, "prompts": [None, {0: batch}, {0: batch}]}
    with torch.no_grad():
        exported = torch.export.export(model, (images, sets), dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(images, sets), model(images, sets))
        fewer = [sets[0], sets[1][:2], sets[2][:2]]
        torch.testing.assert_close(exported(images[:2], fewer), model(images[:2], fewer))


@pytest.mark.parametrize("form", ["one tensor", "a tensor for each set"])
def test_they_compile_without_a_graph_break(form: str) -> None:
    torch._dynamo.reset()
    model = PromptedViT(tiny_vit(torch.float32, depth=2), CLASSES, 4, memory="auto")  # which looks at them
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    is_one = form == "one tensor"
    each = random_prompts(model, BATCH) if is_one else sets_of_other_lengths(model, (False, True, True))
    prompts = each[0] if is_one else each
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(images, prompts), model(images, prompts)
    torch.testing.assert_close(actual, expected)
    for ours, wanted in zip(gradients(actual, model, *each), gradients(expected, model, *each), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("batch", [(), (BATCH,)], ids=["for all images", "each image's own"])
def test_one_compilation_serves_all_lengths_that_are_marked_dynamic(batch: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    model = PromptedViT(tiny_vit(torch.float32, depth=2), CLASSES, 4)
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ((4, 4), (5, 4), (3, 7)):
        sets = [torch.randn(*batch, length, model.embed_dim) for length in lengths]
        for prompts in sets:
            torch._dynamo.mark_dynamic(prompts, len(batch))
        torch.testing.assert_close(compiled(images, sets), model(images, sets))
    assert counter.frame_count == 1


def wrong(*shape: int, **tensor: Any) -> Tensor:
    return torch.zeros(shape, **tensor)


@pytest.mark.parametrize(
    "given, message",
    [
        (wrong(4, 32), r"prompts: got shape \(4, 32\), want \(3, 4, 32\) for .*, or \(3, 3, 4, 32\) for"),
        (wrong(3, 5, 32), r"prompts: got shape \(3, 5, 32\), want \(3, 4, 32\)"),
        (wrong(2, 3, 4, 32), r"prompts: got shape \(2, 3, 4, 32\), want"),
        (wrong(1, 3, 4, 32), r"prompts: got shape \(1, 3, 4, 32\), want"),
        (wrong(3, 4, 32, dtype=torch.int64), "prompts: got torch.int64, want a tensor of floating-point"),
        (1, "prompts: got int, want one tensor, or a sequence of 3, one for each of the model's sets"),
        ([wrong(4, 32)], "prompts: got 1 tensors, want one tensor, or a sequence of 3, one for each"),
        ([[0.0]] * 3, "prompts.0: got list, want a tensor of floating-point"),
        ([wrong(4, 32)] * 2 + [wrong(5, 30)], r"prompts.2: got shape \(5, 30\), want \(5, 32\) for the same"),
        ([wrong(2, 4, 32)] * 3, r"prompts.0: got shape \(2, 4, 32\), want \(4, 32\) for .* \(3, 4, 32\)"),
        ([wrong(0, 32)] * 3, r"prompts.0: got shape \(0, 32\), want 1 prompt or more"),
        (wrong(3, 4, 32, device="meta"), "prompts: got a tensor on meta, want cpu, where the model is"),
    ],
)
def test_others_are_refused_by_name(given: Any, message: str) -> None:
    model, _ = pair("deep")
    with pytest.raises(ValueError, match=message):
        model(random_batch(model, BATCH)[0], prompts=given)


@pytest.mark.parametrize(
    "given, message",
    [
        (wrong(2, 4, 16), r"prompts: got one tensor, want a sequence of 2, as the model's own"),
        ([wrong(2, 4, 16)], r"prompts: got 1 tensors, want a sequence of 2"),
        (1, r"prompts: got int, want a sequence of 2"),
        ([wrong(2, 4, 16), wrong(2, 4, 16)], r"prompts.1: got shape \(2, 4, 16\), want \(2, 4, 32\) for"),
    ],
)
def test_others_are_refused_by_name_in_a_swin(given: Any, message: str) -> None:
    model, _ = pair("swin")
    with pytest.raises(ValueError, match=message):
        model(random_batch(model, BATCH)[0], prompts=given)


@pytest.mark.parametrize("location", ["prepend-pixel", "pad", "concat-channel"])
def test_pixels_are_refused(location: str) -> None:
    model = PromptedViT(tiny_vit(), CLASSES, 4, "shallow", prompt_location=location)
    message = f"prompts: got some for a model with prompt_location='{location}', whose prompts are pixels"
    with pytest.raises(ValueError, match=message):
        model(random_batch(model, BATCH)[0], prompts=torch.zeros(model.prompts.shape))


@pytest.fixture(scope="module")
def page() -> list[str]:
    """The code of docs/prompts.md on these prompts."""
    text = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text()
    section = text.split("## Prompts from elsewhere\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_documented_batch_mixes_tasks(page: list[str]) -> None:
    model = PromptedViT(tiny_vit(torch.float32), CLASSES, 4)
    images = random_batch(model, BATCH, dtype=torch.float32)[0]
    names = dict(globals(), model=model, images=images, num_tasks=4, task_of_image=torch.tensor([2, 0, 2]))
    exec(page[0].replace("cuda", "cpu"), names)
    assert names["features"].shape == (BATCH, 32)
    names["features"].sum().backward()
    used = names["tasks"].grad.abs().amax(dim=(1, 2, 3)) > 0
    assert used.tolist() == [True, False, True, False]


def test_documented_pool_is_trained(page: list[str]) -> None:
    names = dict(globals(), vpt_fast=vpt_fast)
    exec(page[1], names)
    model = names["PromptPool"](tiny_vit(torch.float32), CLASSES)
    images, labels = random_batch(model.prompted, BATCH, dtype=torch.float32)
    logits, likeness = model(images)
    (F.cross_entropy(logits, labels) - likeness.mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"keys", "pool", "prompted.head.weight", "prompted.head.bias"}


@pytest.mark.parametrize("index, name", [(1, "PromptPool"), (2, "CodaPrompt")])
def test_documented_model_holds_one_backbone_that_gives_a_probe_s_features(
    page: list[str], index: int, name: str
) -> None:
    names = dict(globals(), vpt_fast=vpt_fast)
    exec(page[index], names)
    vit = tiny_vit(torch.float32, depth=5)
    model = names[name](vit, CLASSES)
    held = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert held < 1.5 * sum(p.numel() for p in vit.parameters())
    images = random_batch(model.prompted, BATCH, dtype=torch.float32)[0]
    expected = vpt_fast.LinearProbe(vit, CLASSES).image_features(images)
    assert torch.equal(model.unprompted.image_features(images), expected)


def test_documented_keys_and_values_of_tasks_are_trained(page: list[str]) -> None:
    vit = tiny_vit(torch.float32, depth=5)
    images = random_batch(PromptedViT(vit, CLASSES, 1), BATCH, dtype=torch.float32)[0]
    names = dict(globals(), vpt_fast=vpt_fast, vit=vit, num_classes=CLASSES, images=images, num_tasks=4)
    exec(page[3].replace("cuda", "cpu"), names | dict(task_of_image=torch.tensor([2, 0, 2])), names)
    names["logits"].square().sum().backward()
    assert names["general"].grad.abs().amax(dim=(1, 2)).all()
    used = names["expert"].grad.abs().amax(dim=(1, 2, 3)) > 0
    assert used.tolist() == [True, False, True, False]


def test_documented_network_that_computes_keys_and_values_is_trained(page: list[str]) -> None:
    names = dict(globals(), vpt_fast=vpt_fast)
    exec(page[2], names)
    model = names["CodaPrompt"](tiny_vit(torch.float32), CLASSES, blocks=2)
    images, labels = random_batch(model.prompted, BATCH, dtype=torch.float32)
    F.cross_entropy(model(images), labels).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"keys", "attention", "components", "prompted.head.weight", "prompted.head.bias"}
