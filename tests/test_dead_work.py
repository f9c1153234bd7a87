"""The dead work is really not done: operations counted, and bytes kept for backward, against closed forms.

Each case lists, block by block, what there is to do; the forms below say what that costs. B images, N tokens
in the block's input, m prompts that enter it anew, R rows that are read, of the tokens and of those prompts.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import pytest
import torch
from kept_bytes import KeptBytes
from timm.models.deit import VisionTransformerDistilled
from tiny import random_batch, tiny_swin, tiny_vit
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vpt_fast import LinearProbe, PromptedConvNet, PromptedSegmenter, PromptedViT
from vpt_fast.engine.policy import POLICIES
from vpt_fast.engine.stream import Stream
from vpt_fast.tuning.bias import BiasTuning
from vpt_fast.tuning.cls_token import ClsTokenTuning

WIDTH, HEADS, HIDDEN, CLASSES, PATCH = 32, 2, 64, 5, 8
BATCH = 3
PATCHES, N = 16, 17
M = 7


class Block(NamedTuple):
    """What one block has to do. tokens: in its input; prompts: sets of m that are projected (0, 1, or B
    where each image has its own); rows, fresh: tokens and prompts whose output is read; below: whether the
    tokens' gradient is wanted; trained: whether the block runs under autograd at all; formed: whether the
    prompts are the block's own tensor, and not the parameter; key_value: whether they are keys and values,
    which nothing projects."""

    tokens: int
    prompts: int
    rows: int
    fresh: int
    below: bool
    trained: bool = True
    formed: bool = False
    key_value: bool = False

    @property
    def projected(self) -> int:
        """Sets of prompts that are normalised and projected."""
        return 0 if self.key_value else self.prompts


SETTINGS = {
    "deep": dict(num_prompts=M),
    "deep_image_pool": dict(num_prompts=M, pool="image"),
    "deep_prompt_pool": dict(num_prompts=M, pool="prompts"),
    "deep_image_and_prompt_pool": dict(num_prompts=M, pool="image_and_prompts"),
    "deep_dropout_per_image": dict(num_prompts=M, prompt_dropout=0.5),
    "deep_dropout_per_batch": dict(num_prompts=M, prompt_dropout=0.5, prompt_dropout_per="batch"),
    "deep_shared": dict(num_prompts=M, prompt_shared=True),
    "shallow": dict(num_prompts=M, prompt_type="shallow"),
    "first_two_flow": dict(num_prompts=M, prompt_layers=2),
    "first_two_drop": dict(num_prompts=M, prompt_layers=2, after_prompts="drop"),
    "last_one": dict(num_prompts=M, prompt_layers=-1),
    "last_two": dict(num_prompts=M, prompt_layers=-2),
    "gap_flow": dict(num_prompts=M, prompt_layers=[0, 2]),
    "gap_drop": dict(num_prompts=M, prompt_layers=[0, 2], after_prompts="drop"),
    "key_value": dict(num_prompts=M, prompt_location="key-value"),
    "key_value_gap": dict(num_prompts=M, prompt_location="key-value", prompt_layers=[0, 2]),
    "key_value_dropout_per_image": dict(num_prompts=M, prompt_location="key-value", prompt_dropout=0.5),
    "add_deep": dict(prompt_location="add"),
    "add_one_before_block_1": dict(prompt_location="add-1", prompt_layers=[1]),
}

ALL = N + M
WORK = {
    "deep": [Block(N, 1, N, 0, False), Block(N, 1, N, 0, True), Block(N, 1, 1, 0, True)],
    "deep_image_pool": [Block(N, 1, N, 0, False), Block(N, 1, N, 0, True), Block(N, 1, PATCHES, 0, True)],
    "deep_prompt_pool": [Block(N, 1, N, 0, False), Block(N, 1, N, 0, True), Block(N, 1, 0, M, True)],
    "deep_image_and_prompt_pool": [
        Block(N, 1, N, 0, False),
        Block(N, 1, N, 0, True),
        Block(N, 1, PATCHES, M, True),
    ],
    "deep_dropout_per_image": [
        Block(N, BATCH, N, 0, False, formed=True),
        Block(N, BATCH, N, 0, True, formed=True),
        Block(N, BATCH, 1, 0, True, formed=True),
    ],
    "deep_dropout_per_batch": [
        Block(N, 1, N, 0, False, formed=True),
        Block(N, 1, N, 0, True, formed=True),
        Block(N, 1, 1, 0, True, formed=True),
    ],
    "shallow": [Block(N, 1, N, M, False), Block(ALL, 0, ALL, 0, True), Block(ALL, 0, 1, 0, True)],
    "first_two_flow": [Block(N, 1, N, 0, False), Block(N, 1, N, M, True), Block(ALL, 0, 1, 0, True)],
    "first_two_drop": [Block(N, 1, N, 0, False), Block(N, 1, N, 0, True), Block(N, 0, 1, 0, True)],
    "last_one": [
        Block(N, 0, N, 0, False, trained=False),
        Block(N, 0, N, 0, False, trained=False),
        Block(N, 1, 1, 0, False),
    ],
    "last_two": [
        Block(N, 0, N, 0, False, trained=False),
        Block(N, 1, N, 0, False),
        Block(N, 1, 1, 0, True),
    ],
    # block 1's prompts are replaced before block 2: their rows are not computed
    "gap_flow": [Block(N, 1, N, M, False), Block(ALL, 0, N, 0, True), Block(N, 1, 1, 0, True)],
    "gap_drop": [Block(N, 1, N, 0, False), Block(N, 0, N, 0, True), Block(N, 1, 1, 0, True)],
    "key_value": [
        Block(N, 1, N, 0, False, key_value=True),
        Block(N, 1, N, 0, True, key_value=True),
        Block(N, 1, 1, 0, True, key_value=True),
    ],
    "key_value_gap": [
        Block(N, 1, N, 0, False, key_value=True),
        Block(N, 0, N, 0, True),
        Block(N, 1, 1, 0, True, key_value=True),
    ],
    "key_value_dropout_per_image": [
        Block(N, BATCH, N, 0, False, formed=True, key_value=True),
        Block(N, BATCH, N, 0, True, formed=True, key_value=True),
        Block(N, BATCH, 1, 0, True, formed=True, key_value=True),
    ],
    "add_deep": [Block(N, 0, N, 0, True), Block(N, 0, N, 0, True), Block(N, 0, 1, 0, True)],
    "add_one_before_block_1": [
        Block(N, 0, N, 0, False, trained=False),
        Block(N, 0, N, 0, True),
        Block(N, 0, 1, 0, True),
    ],
}
WORK["deep_shared"] = WORK["deep"]


def linear(rows: int, inputs: int, outputs: int) -> int:
    """Floating-point operations of a matrix product, two for each multiply-add."""
    return 2 * rows * inputs * outputs


def forward_flops(block: Block) -> int:
    rows, keys = block.rows + block.fresh, block.tokens + (M if block.prompts else 0)
    return (
        linear(BATCH * block.tokens, WIDTH, 2 * WIDTH)  # keys and values of all tokens
        + linear(BATCH * block.rows, WIDTH, WIDTH)  # queries of the rows that are read
        + linear(block.projected * M, WIDTH, 2 * WIDTH)
        + linear(block.prompts * block.fresh, WIDTH, WIDTH)
        + 2 * linear(BATCH * rows, WIDTH, keys)  # Q Kᵀ and P V, over all heads
        + linear(BATCH * rows, WIDTH, WIDTH)
        + 2 * linear(BATCH * rows, WIDTH, HIDDEN)
    )


def projections_flops(block: Block) -> int:
    """Of what "compact" projects anew: Q, K and V where x̂1 is kept for them, K and V of each image's own
    prompts."""
    total = 0
    if block.below:
        total += linear(BATCH * block.tokens, WIDTH, 2 * WIDTH) + linear(BATCH * block.rows, WIDTH, WIDTH)
        total += linear(block.prompts * block.fresh, WIDTH, WIDTH)
    if block.projected > 1:
        total += linear(block.projected * M, WIDTH, 2 * WIDTH)
    return total


def backward_flops(block: Block) -> int:
    if not block.trained:
        return 0
    rows, keys = block.rows + block.fresh, block.tokens + (M if block.prompts else 0)
    total = 2 * linear(BATCH * rows, WIDTH, HIDDEN) + linear(BATCH * rows, WIDTH, WIDTH)
    if block.below:
        total += 5 * linear(BATCH * rows, WIDTH, keys)  # S, dP, dQ, dK, dV
        total += linear(BATCH * block.tokens, 2 * WIDTH, WIDTH) + linear(BATCH * block.rows, WIDTH, WIDTH)
    else:
        total += 4 * linear(BATCH * block.rows, WIDTH, M)  # S, dP, dK, dV over the prompts' columns alone
        total += 3 * linear(BATCH * block.fresh, WIDTH, keys)  # S, dP, dQ of prompts that go on
        total += 2 * linear(BATCH * block.fresh, WIDTH, M)  # and their share of the prompts' dK, dV
    total += linear(block.projected * M, 2 * WIDTH, WIDTH) + linear(block.prompts * block.fresh, WIDTH, WIDTH)
    return total


def kept_bytes(block: Block, size: int, memory: str = "exact") -> int:
    """Where elements and statistics are of `size` bytes and codes of one."""
    if not block.trained:
        return 0
    rows, image_keys = block.rows + block.fresh, block.below or block.fresh > 0
    if memory == "recompute":  # the input
        prompt_width = 2 * WIDTH if block.key_value else WIDTH
        return (BATCH * block.tokens * WIDTH + block.formed * block.prompts * M * prompt_width) * size
    compact = memory == "compact"
    x_hat = (WIDTH + 1) * size  # and rstd
    codes = WIDTH + 2 * size  # with scale and rstd
    total = BATCH * rows * (HEADS * size + (codes if compact else x_hat))  # lse, x̂2
    if not (compact and block.below):
        total += 2 * BATCH * rows * WIDTH * size  # Q, O
        if image_keys:
            total += BATCH * block.tokens * 2 * WIDTH * size  # K, V
    if memory != "recompute_mlp":
        total += BATCH * rows * HIDDEN * (1 if compact else size)
    if block.below:
        total += BATCH * block.tokens * x_hat  # x̂1
    total += block.projected * M * x_hat
    if not (compact and block.projected > 1):
        total += block.prompts * M * 2 * WIDTH * size  # K, V of the prompts
    return total


def prompted(setting: str, dtype: torch.dtype = torch.float64, memory: str = "exact") -> PromptedViT:
    return PromptedViT(tiny_vit(dtype=dtype), CLASSES, memory=memory, **SETTINGS[setting]).to(dtype).train()


@pytest.mark.parametrize("setting", SETTINGS)
def test_forward_operations_equal_the_closed_form(setting: str) -> None:
    model = prompted(setting)
    images, _ = random_batch(model, BATCH)
    with FlopCounterMode(display=False) as counter:
        model(images)
    patches = linear(BATCH * PATCHES, 3 * PATCH * PATCH, WIDTH)
    head = linear(BATCH, WIDTH, CLASSES)
    assert counter.get_total_flops() == patches + sum(map(forward_flops, WORK[setting])) + head


@pytest.mark.parametrize("setting", SETTINGS)
def test_backward_operations_equal_the_closed_form(setting: str) -> None:
    model = prompted(setting)
    images, labels = random_batch(model, BATCH)
    loss = F.cross_entropy(model(images), labels)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    head = 2 * linear(BATCH, WIDTH, CLASSES)  # gradients of the feature and of the head's weight
    assert counter.get_total_flops() == sum(map(backward_flops, WORK[setting])) + head


@pytest.mark.parametrize(
    "setting",
    [
        "deep",
        "deep_dropout_per_image",
        "shallow",
        "first_two_flow",
        "last_two",
        "key_value_gap",
        "key_value_dropout_per_image",
    ],
)
@pytest.mark.parametrize("memory", ["compact", "recompute_mlp", "recompute"])
def test_operations_of_a_memory_policy_are_those_and_what_is_formed_again(setting: str, memory: str) -> None:
    model = prompted(setting, memory=memory)
    images, labels = random_batch(model, BATCH)
    loss = F.cross_entropy(model(images), labels)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    again = {
        "compact": projections_flops,
        "recompute_mlp": lambda block: linear(BATCH * (block.rows + block.fresh), WIDTH, HIDDEN),
        # what leaves the MLP is not needed again
        "recompute": lambda b: forward_flops(b) - linear(BATCH * (b.rows + b.fresh), HIDDEN, WIDTH),
    }[memory]
    expected = sum(backward_flops(b) + (again(b) if b.trained else 0) for b in WORK[setting])
    assert counter.get_total_flops() == expected + 2 * linear(BATCH, WIDTH, CLASSES)


# Dropout's masks, which PyTorch keeps in the prompts' dtype on the CPU: numbers of all blocks.
MASKS = {
    "deep_dropout_per_image": 3 * BATCH * M * WIDTH,
    "deep_dropout_per_batch": 3 * M * WIDTH,
    "key_value_dropout_per_image": 3 * BATCH * M * 2 * WIDTH,
}

CASES = [(setting, "exact", dtype) for setting in SETTINGS for dtype in (torch.float32, torch.float64)]
CASES += [
    (setting, memory, torch.float32)
    for setting in (
        "deep",
        "deep_dropout_per_image",
        "deep_dropout_per_batch",
        "shallow",
        "first_two_flow",
        "last_two",
        "key_value_gap",
        "key_value_dropout_per_image",
        "add_deep",
    )
    for memory in ("compact", "recompute_mlp", "recompute")
]


@pytest.mark.parametrize(
    ("setting", "memory", "dtype"), CASES, ids=[f"{s}-{m}-{str(d)[6:]}" for s, m, d in CASES]
)
def test_bytes_kept_equal_the_closed_form_and_the_estimate(
    setting: str, memory: str, dtype: torch.dtype
) -> None:
    model = prompted(setting, dtype, memory)
    images, _ = random_batch(model, BATCH, dtype=dtype)
    with KeptBytes(model, images) as everything:
        rows = record_last_rows(model)
        model(images)
    # After the blocks: the rows that the final norm is given, its mean and rstd, and the head's input.
    after = rows.count * (WIDTH + 2) + WIDTH
    around = (BATCH * after + MASKS.get(setting, 0)) * dtype.itemsize
    blocks = sum(kept_bytes(block, dtype.itemsize, memory) for block in WORK[setting])
    assert everything.total == blocks + around
    assert model.estimate_training_bytes(BATCH)["kept"] == blocks + around


@pytest.mark.parametrize(
    "settings",
    [
        dict(prompt_project=8),
        dict(prompt_project=8, prompt_shared=True),
        dict(prompt_project=8, prompt_shared=True, prompt_dropout=0.5, prompt_dropout_per="batch"),
        dict(prompt_location="prepend-pixel", prompt_type="shallow"),
    ],
    ids=["projected", "projected_shared", "projected_shared_dropped", "pixels"],
)
def test_prompts_that_a_step_forms_are_in_the_estimate_of_recompute(settings: dict[str, Any]) -> None:
    # Behind the blocks the same is kept under both; in the blocks of the second the prompts are not kept.
    outside = []
    for memory in ("recompute", "recompute_mlp"):
        num_prompts = 8 if "prompt_location" in settings else M
        model = PromptedViT(tiny_vit(dtype=torch.float32), CLASSES, num_prompts, memory=memory, **settings)
        images, _ = random_batch(model.train(), BATCH, dtype=torch.float32)
        with KeptBytes(model, images) as everything:
            model(images)
        outside.append(everything.total - model.estimate_training_bytes(BATCH)["kept"])
    assert outside[0] == outside[1]


@pytest.mark.parametrize("memory", ["exact", "compact", "recompute_mlp", "recompute"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(prompt_layers=[0, 1]),
        dict(prompt_layers=[0, 1], pool="image_and_prompts"),
        dict(prompt_layers=[0, 2], prompt_dropout=0.5),
        dict(prompt_layers=[0, 2], prompt_location="key-value"),
    ],
    ids=["flowing", "read", "dropped", "key_value"],
)
def test_kept_for_a_tensor_for_each_set_is_the_estimate_for_their_shapes(
    settings: dict[str, Any], memory: str
) -> None:
    model = PromptedViT(tiny_vit(dtype=torch.float32), CLASSES, M, memory=memory, **settings).train()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    shapes = ((1, M + 3), (BATCH, M - 2))
    width = model.prompts.shape[-1]
    of_all = torch.randn(M + 3, width, requires_grad=True)
    of_each = torch.randn(BATCH, M - 2, width, requires_grad=True)
    with KeptBytes(model, images, of_all) as everything:
        rows = record_last_rows(model)
        model(images, prompts=[of_all, of_each])
    num_tokens = model.backbone.num_tokens
    blocks, _ = model._step_bytes(BATCH, num_tokens, torch.float32, POLICIES[memory], shapes)
    assert rows.count == model._num_rows_read(num_tokens, shapes)
    after = rows.count * (WIDTH + 2) + WIDTH
    assert everything.total == blocks + BATCH * after * torch.float32.itemsize


POOLS = {
    "attention_pool": (dict(global_pool="map", class_token=False), {}),  # SigLIP's
    "attention_pool_and_cls": (dict(global_pool="map"), {}),
    "mean": ({}, dict(pool="image_and_prompts")),
    "norm_after_mean": (dict(global_pool="avg"), {}),
    "two_tokens": (dict(kind=VisionTransformerDistilled), {}),
}


# The estimate has statistics of rows in float32 as on a GPU, and attention's scores instead of their sums.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(("backbone", "settings"), POOLS.values(), ids=POOLS)
def test_what_pooling_keeps_is_in_the_estimate(
    backbone: dict[str, Any], settings: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    vit = tiny_vit(torch.float32, **backbone)
    model = PromptedViT(vit, CLASSES, M, dtype=dtype, **settings).train()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert model.estimate_training_bytes(BATCH)["kept"] == pytest.approx(kept.total, rel=tolerance)


BEFORE = {
    "channels": lambda: PromptedViT(
        tiny_vit(torch.float32), CLASSES, M, "shallow", prompt_location="concat-channel"
    ),
    "border_and_norm": lambda: PromptedViT(
        tiny_vit(torch.float32, pre_norm=True), CLASSES, 4, "shallow", prompt_location="pad"
    ),
    "unfrozen": lambda: unfrozen_embedding(PromptedViT(tiny_vit(torch.float32), CLASSES, M)),
    "cls_token": lambda: ClsTokenTuning(tiny_vit(torch.float32, pre_norm=True), CLASSES),
}


def unfrozen_embedding(model: PromptedViT) -> PromptedViT:
    model.backbone.stem.patch_embed.requires_grad_(True)
    return model


@pytest.mark.parametrize("build", BEFORE.values(), ids=BEFORE)
def test_what_is_kept_before_the_blocks_is_in_the_estimate(build) -> None:
    model = build().train()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        model(images)
    assert model.estimate_training_bytes(BATCH)["kept"] == kept.total


COUNTED = {
    "pooling": lambda: PromptedViT(tiny_vit(global_pool="map", class_token=False), CLASSES, M),
    "convnet": lambda: PromptedConvNet("resnet10t", CLASSES, 2, img_size=32),
    "probe_of_a_convnet": lambda: LinearProbe("resnet10t", CLASSES, img_size=32),
    "segmenter": lambda: PromptedSegmenter(tiny_vit(), CLASSES, num_prompts=M, head_channels=8),
    "timms_swin": lambda: BiasTuning(tiny_swin(), CLASSES),
}


@pytest.mark.parametrize("build", COUNTED.values(), ids=COUNTED)
def test_counting_what_is_kept_calls_no_hooks(build) -> None:
    model = build()
    called, lock = [], threading.Lock()  # which cannot be copied

    class Watch:
        def __init__(self) -> None:
            self.lock = lock

        def __call__(self, *_: Any) -> None:
            called.append(1)

    for module in model.modules():
        module.register_forward_hook(Watch())
    assert model.estimate_training_bytes(BATCH)["kept"] > 0
    assert not called


def test_auto_leaves_room_for_what_attention_pooling_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = tiny_vit(torch.float32, global_pool="map", class_token=False)
    model = PromptedViT(vit, CLASSES, M, memory="auto")
    blocks = sum(model._step_bytes(BATCH, model.backbone.num_tokens, torch.float32, POLICIES["exact"]))
    monkeypatch.setattr("vpt_fast.classifier.free_bytes", lambda device: int((blocks + 1) / 0.9))
    assert model.memory_policy(BATCH) != "exact"


@pytest.mark.parametrize("location", ["add", "add-1"])
@pytest.mark.parametrize("per", ["image", "batch"])
def test_masks_of_added_prompts_are_in_the_estimate(location: str, per: str) -> None:
    kept, estimates = [], []
    for p in (0.0, 0.5):
        settings = dict(prompt_location=location, prompt_dropout=p, prompt_dropout_per=per)
        model = PromptedViT(tiny_vit(dtype=torch.float32), CLASSES, **settings).train()
        images, _ = random_batch(model, BATCH, dtype=torch.float32)
        with KeptBytes(model, images) as everything:
            model(images)
        kept.append(everything.total)
        estimates.append(model.estimate_training_bytes(BATCH)["kept"])
    assert estimates[1] - estimates[0] == kept[1] - kept[0] > 0


def test_half_precision_keeps_half_and_float32_statistics() -> None:
    vit = tiny_vit(dtype=torch.float32)
    model = PromptedViT(vit, CLASSES, M, dtype=torch.bfloat16).train()
    images, _ = random_batch(model, BATCH, dtype=torch.float32)
    with KeptBytes(model, images) as kept:
        rows = record_last_rows(model)
        model(images)
    statistics = sum(  # rstd and lse stay float32, two bytes more an element than bfloat16
        BATCH * (b.rows * (HEADS + 1) + b.tokens * b.below) + b.prompts * M for b in WORK["deep"]
    )
    blocks = sum(kept_bytes(b, 2) for b in WORK["deep"]) + 2 * statistics
    # After the blocks: the final norm's input and statistics in bfloat16, the head's input in float32.
    after = BATCH * (rows.count * (WIDTH + 2) * 2 + WIDTH * 4)
    assert kept.total == blocks + after
    # On a GPU the norm's statistics, mean and 1/σ of a row, are float32 there too, and so in the estimate.
    wider = BATCH * rows.count * 2 * 2
    assert model.estimate_training_bytes(BATCH)["kept"] == blocks + after + wider


def test_recomputing_keeps_half_of_a_residual_stream_in_16_bits() -> None:
    vit, estimates, kept = tiny_vit(dtype=torch.float32), [], []
    for residual_dtype in (None, torch.bfloat16):
        model = PromptedViT(vit, CLASSES, M, residual_dtype=residual_dtype, memory="recompute").train()
        images, _ = random_batch(model, BATCH, dtype=torch.float32)
        with KeptBytes(model, images) as everything, torch.autocast("cpu", torch.bfloat16):
            model(images)
        kept.append(everything.total)
        with torch.autocast("cpu", torch.bfloat16):
            estimates.append(model.estimate_training_bytes(BATCH)["kept"])
    assert kept[0] - kept[1] == estimates[0] - estimates[1] == 3 * BATCH * N * WIDTH * 2


def test_linear_probe_keeps_nothing_but_the_features() -> None:
    model = LinearProbe(tiny_vit(), CLASSES).double()
    images, _ = random_batch(model, BATCH)
    with KeptBytes(model, images) as kept:
        model(images)
    assert kept.total == BATCH * WIDTH * 8
    assert LinearProbe(tiny_vit(), CLASSES).double().estimate_training_bytes(BATCH)["kept"] == kept.total


def test_inference_keeps_nothing() -> None:
    model = prompted("deep").eval()
    images, _ = random_batch(model, BATCH)
    with KeptBytes(model, images) as kept, torch.no_grad():
        model(images)
    assert kept.total == 0


class record_last_rows:
    """How many rows of an image the last block gives to what follows it."""

    def __init__(self, model: PromptedViT) -> None:
        self.count = 0
        model.backbone.blocks[-1].register_forward_hook(self._record)

    def _record(self, module: torch.nn.Module, inputs: tuple, output: Stream) -> None:
        self.count = output.num_tokens
