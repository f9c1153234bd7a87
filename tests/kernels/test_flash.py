"""FlashAttention on the extended sequence, held against concatenation in float64.

The CUDA libraries cannot run here. Each is stood in for by plain PyTorch behind its own argument list, so
that what is handed over and how the answers are laid out is what is tested.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vpt_fast.kernels.prompted_attention import flash
from vpt_fast.kernels.prompted_attention.flash import FLASH_BACKENDS, get_flash
from vpt_fast.kernels.prompted_attention.reference import AttentionGrads

CUDA = tuple(name for name in FLASH_BACKENDS if name != "sdpa_cpu")

# B, R, N, m, batch dimension of the prompts, H, D
SHAPES = {
    "shared": (3, 13, 13, 7, 1, 2, 16),
    "per_image": (3, 13, 13, 7, 3, 2, 16),
    "no_prompts": (2, 13, 13, 0, 1, 2, 16),
    "one_row_read": (3, 1, 17, 5, 1, 3, 8),
    "few_rows_read": (2, 3, 17, 1, 1, 3, 24),
    "one_image_one_token": (1, 1, 1, 1, 1, 1, 8),
}
WANTED = {
    "packed": dict(need_q=True, need_kv=True, packed=True),
    "q_and_kv": dict(need_q=True, need_kv=True),
    "q": dict(need_q=True, need_kv=False),
    "kv": dict(need_q=False, need_kv=True),
}
PROMPTS_ONLY = dict(need_q=False, need_kv=False)


@dataclasses.dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prompt_k: torch.Tensor | None
    prompt_v: torch.Tensor | None
    grad_out: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        return self.q, self.k, self.v, self.prompt_k, self.prompt_v

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(None if x is None else x.to(dtype) for x in vars(self).values()))


def make_case(shape: str) -> Case:
    """Tensors in float64: views of packed ones wherever the block hands over views."""
    batch, rows, tokens, m, prompt_batch, heads, dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    q, k, v = normal(batch, tokens, 3, heads, dim).unbind(2)
    prompts = normal(prompt_batch, m, 2, heads, dim).unbind(2) if m else (None, None)
    q /= dim**0.5  # the softmax scale, which the block folds into q's projection
    return Case(q[:, :rows], k, v, *prompts, normal(batch, rows, heads, dim))


def definition(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """O, lse and every gradient by autograd, from prompts that are concatenated."""
    names = ("q", "k", "v", "prompt_k", "prompt_v")
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in zip(names, case.inputs, strict=True)
        if x is not None
    }
    q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
    if case.prompt_k is not None:
        shape = (k.shape[0], -1, -1, -1)
        k, v = (
            torch.cat((leaves[f"prompt_{name}"].expand(shape).transpose(1, 2), x), dim=2)
            for name, x in (("k", k), ("v", v))
        )
    scores = q @ k.transpose(-1, -2)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    out.backward(case.grad_out)
    return out.detach(), scores.logsumexp(-1).detach(), {name: x.grad for name, x in leaves.items()}


def by_name(grads: AttentionGrads) -> dict[str, torch.Tensor]:
    found = {}
    if grads.qkv is not None:
        found.update(zip("qkv", grads.qkv.unbind(2), strict=True))
    if grads.q is not None:
        found["q"] = grads.q
    if grads.kv is not None:
        found.update(zip("kv", grads.kv.unbind(2), strict=True))
    if grads.prompt_kv is not None:
        found.update(zip(("prompt_k", "prompt_v"), grads.prompt_kv.unbind(2), strict=True))
    return found


def check_against_definition(name: str, case: Case, wanted: dict[str, bool]) -> None:
    attention, attention_backward = get_flash(name)
    out, lse = attention(*case.inputs)
    expected_out, expected_lse, expected = definition(case)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    if not (wanted["need_q"] or wanted["need_kv"]):
        case.k = case.v = None
    grads = attention_backward(case.grad_out, *case.inputs, out, lse, **wanted)
    names = {name for name in expected if name.startswith("prompt")}
    names |= {"q"} if wanted["need_q"] else set()
    names |= {"k", "v"} if wanted["need_kv"] else set()
    actual = by_name(grads)
    assert actual.keys() == names
    assert (grads.qkv is not None) == wanted.get("packed", False)
    for name in names:
        error = (actual[name] - expected[name]).abs().max()
        assert error < 1e-12 * expected[name].abs().max().clamp(min=1), name


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_cpu_equals_concatenation(shape: str, wanted: dict[str, bool]) -> None:
    case = make_case(shape)
    if wanted.get("packed") and case.q.shape != case.k.shape:
        case.q, case.grad_out = case.k.flip(1), case.grad_out[:, :1].expand(case.k.shape).contiguous()
    check_against_definition("sdpa_cpu", case, wanted)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "no_prompts"])
def test_sdpa_cpu_needs_no_keys_of_the_image_for_the_prompts_gradients(shape: str) -> None:
    check_against_definition("sdpa_cpu", make_case(shape), PROMPTS_ONLY)


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_error_of_sdpa_cpu_is_at_most_that_of_eager(dtype: torch.dtype) -> None:
    low = make_case("shared").to(dtype)
    exact, eager = definition(low.to(torch.float64))[2], definition(low)[2]
    attention, attention_backward = get_flash("sdpa_cpu")
    out, lse = attention(*low.inputs)
    grads = by_name(attention_backward(low.grad_out, *low.inputs, out, lse, need_q=True, need_kv=True))
    for name in exact:
        ours, theirs = ((x[name].double() - exact[name]).norm() for x in (grads, eager))
        assert ours <= 1.25 * theirs, name


def test_sdpa_cpu_in_float32_is_exact_to_rounding() -> None:
    """Not to eager's own: the kernel's exponential is a faster one (1.1 to 1.6 times eager's error)."""
    low = make_case("shared").to(torch.float32)
    exact = definition(low.to(torch.float64))[2]
    attention, attention_backward = get_flash("sdpa_cpu")
    out, lse = attention(*low.inputs)
    grads = by_name(attention_backward(low.grad_out, *low.inputs, out, lse, need_q=True, need_kv=True))
    for name in exact:
        assert (grads[name] - exact[name]).norm() < 1e-6 * exact[name].norm(), name


@pytest.mark.parametrize("wanted", [*WANTED.values(), PROMPTS_ONLY], ids=[*WANTED, "prompts_only"])
def test_fake_tensors_are_like_real_ones(wanted: dict[str, bool]) -> None:
    case = make_case("shared").to(torch.bfloat16)  # lse is wider
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.vpt_fast.flash_attention.default, ("sdpa_cpu", *case.inputs), test_utils=checks
    )
    out, lse = get_flash("sdpa_cpu")[0](*case.inputs)
    args = ("sdpa_cpu", case.grad_out, *case.inputs, out, lse)
    flags = (wanted["need_q"], wanted["need_kv"], wanted.get("packed", False))
    torch.library.opcheck(
        torch.ops.vpt_fast.flash_attention_backward.default, (*args, *flags), test_utils=checks
    )


# What stands in for the libraries: PyTorch on (B, rows, H, D), with the softmax scale they are told.


def plain_forward(q: Any, k: Any, v: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("brhd,bnhd->bhrn", q, k) * scale
    return torch.einsum("bhrn,bnhd->brhd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)


def plain_backward(
    grad_out: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float
) -> tuple[torch.Tensor, ...]:
    assert out.is_contiguous() and grad_out.is_contiguous() and lse.is_contiguous()
    probabilities = (torch.einsum("brhd,bnhd->bhrn", q, k) * scale - lse.unsqueeze(-1)).exp()
    delta = (grad_out * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = probabilities * (torch.einsum("brhd,bnhd->bhrn", grad_out, v) - delta) * scale
    return (
        torch.einsum("bhrn,bnhd->brhd", grad_scores, k).contiguous(),
        torch.einsum("bhrn,brhd->bnhd", grad_scores, q).contiguous(),
        torch.einsum("bhrn,brhd->bnhd", probabilities, grad_out).contiguous(),
    )


class FlashAttn2(types.ModuleType):
    """The private functions of flash-attn 2.8."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, return_softmax) == (0.0, False, 0.0, None, False)
        assert (window_size_left, window_size_right) == (-1, -1)
        return *plain_forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, deterministic) == (0.0, False, 0.0, None, True)
        assert (window_size_left, window_size_right) == (-1, -1)
        grads = plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale)
        for made, x in zip((dq, dk, dv), grads, strict=True):
            made.copy_(x)
        return torch.empty(0)


class FlashAttn3(types.ModuleType):
    """Those of flash_attn_interface, without the arguments for caches and varying lengths."""

    @staticmethod
    def _flash_attn_forward(q, k, v, *, softmax_scale=None, causal=False, num_splits=1):
        assert (causal, num_splits) == (False, 1)
        return *plain_forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, *, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        deterministic=False,
    ):  # fmt: skip
        assert (is_causal, deterministic) == (False, True)
        grads = plain_backward(dout, q, k, v, out, softmax_lse, softmax_scale)
        for made, x in zip((dq, dk, dv), grads, strict=True):
            made.copy_(x)
        return torch.empty(0)


class FlashAttn4(types.ModuleType):
    """Those of flash_attn.cute.interface."""

    @staticmethod
    def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False):
        out, lse = plain_forward(q, k, v, softmax_scale)
        return out, lse if return_lse else None, None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *, deterministic=False
    ):
        assert deterministic
        return plain_backward(dout, q, k, v, out, lse, softmax_scale)


class FakeAten:
    """PyTorch's CUDA kernels: their real schemas say which argument is which."""

    def __init__(self) -> None:
        self.deterministic: list[bool] = []  # in each backward pass

    def __getattr__(self, name: str) -> Any:
        schema = getattr(torch.ops.aten, name).default._schema

        def call(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            names = [argument.name for argument in schema.arguments]
            named = dict(zip(names[: len(args)], args, strict=True)) | kwargs
            required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
            assert required <= named.keys()
            assert (named["dropout_p"], named["is_causal"]) == (0.0, False)
            assert named.get("attn_bias") is None
            return self.run(name, named)

        return types.SimpleNamespace(default=call)

    def run(self, name: str, named: dict[str, Any]) -> tuple[Any, ...]:
        q, k, v = (named[x].transpose(1, 2) for x in ("query", "key", "value"))
        is_cudnn = "cudnn" in name
        if not name.endswith("backward"):
            assert not is_cudnn or q.shape[1] > 1, "cuDNN takes no single row"
            assert named.get("compute_log_sumexp", True)
            out, lse = plain_forward(q, k, v, named["scale"])
            return out.transpose(1, 2), lse.unsqueeze(-1) if is_cudnn else lse, None, None, 0, 0, None, None
        assert not is_cudnn or min(q.shape[1], k.shape[1]) > 1, "cuDNN takes no single row"
        self.deterministic.append(torch.get_deterministic_debug_mode() == 2)
        assert (named["cum_seq_q"], named["cum_seq_k"]) == (None, None)
        assert (named["max_q"], named["max_k"]) == (q.shape[1], k.shape[1])
        assert named["philox_seed"].dtype == (torch.int64 if is_cudnn else torch.uint64)
        grad_out, out = (named[x].transpose(1, 2) for x in ("grad_out", "out"))
        lse = named["logsumexp"].squeeze(-1) if is_cudnn else named["logsumexp"]
        grads = plain_backward(grad_out, q, k, v, out, lse.contiguous(), named["scale"])
        return tuple(x.transpose(1, 2) for x in grads)


@pytest.fixture(autouse=True)
def no_library_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_made", {})


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> FakeAten:
    """Every library as if it were installed; in float64 on the CPU where a test allows it."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    for name, module in {
        "flash_attn.flash_attn_interface": FlashAttn2,
        "flash_attn_interface": FlashAttn3,
        "flash_attn.cute": types.ModuleType,
        "flash_attn.cute.interface": FlashAttn4,
    }.items():
        monkeypatch.setitem(sys.modules, name, module(name))
    fake = FakeAten()
    monkeypatch.setattr(flash, "aten", fake)
    return fake


@pytest.fixture
def on_cpu(stand_ins: FakeAten, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAten]:
    for name in CUDA:
        library = dataclasses.replace(flash._LIBRARIES[name](), device="cpu", dtypes=(torch.float64,))
        monkeypatch.setitem(flash._LIBRARIES, name, lambda library=library: library)
    yield stand_ins


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CUDA)
def test_what_is_handed_to_the_library_and_back_equals_concatenation(name: str, shape: str) -> None:
    check_against_definition(name, make_case(shape), WANTED["q_and_kv"])


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("shape", ["shared", "one_row_read", "one_image_one_token"])
@pytest.mark.parametrize("name", CUDA)
def test_prompts_alone_are_handed_over_for_their_gradients(name: str, shape: str) -> None:
    check_against_definition(name, make_case(shape), PROMPTS_ONLY)


@pytest.mark.parametrize(("how", "dim"), [(torch.cat, 1), (torch.stack, 2)], ids=["cat", "stack"])
def test_rows_are_joined_16_bytes_at_a_time(how: Any, dim: int) -> None:
    q, k, v = torch.randn(2, 5, 3, 2, 8).bfloat16().unbind(2)
    parts, sizes = (q[:1].expand(2, -1, -1, -1), k, v), []

    def recorded(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
        sizes.extend(x.element_size() for x in parts)
        return how(parts, dim)

    joined = flash._join(recorded, parts, dim)
    assert joined.is_contiguous() and torch.equal(joined, how(parts, dim))
    assert sizes == [16, 16, 16]


def starting_at(storage: int, offset: int) -> torch.Tensor:
    """(2, 5, 2, 8) in a storage that starts so many elements of 4 bytes after a multiple of 16 bytes, so many
    elements after its start."""
    memory = torch.from_numpy(torch.randn(storage + offset + 2 * 5 * 16).numpy()[storage:])
    return memory[offset:].view(2, 5, 2, 8)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 3, 7),  # 84 bytes a row
        torch.randn(2, 5, 2, 8, 3)[..., 0],
        torch.randn(2, 2, 5, 8).transpose(1, 2),
        starting_at(2, 0),
        starting_at(2, 2),
        torch.randn(2, 5, 18)[..., :16].unflatten(2, (2, 8)),
    ],
    ids=["short", "not contiguous", "heads apart", "address", "offset in the storage", "rows apart"],
)
def test_rows_that_are_no_whole_16_bytes_are_joined_as_they_are(x: torch.Tensor) -> None:
    sizes = []

    def recorded(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
        sizes.extend(x.element_size() for x in parts)
        return torch.cat(parts, dim)

    assert torch.equal(flash._join(recorded, (x, x), 1), torch.cat((x, x), 1))
    assert sizes == [4, 4]


def test_sdpa_flash_is_deterministic_and_leaves_the_mode_as_it_was(on_cpu: FakeAten) -> None:
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    check_against_definition("sdpa_flash", make_case("shared"), WANTED["packed"])
    assert on_cpu.deterministic == [True]
    after = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before


@pytest.mark.usefixtures("on_cpu")
def test_sdpa_cudnn_refuses_what_it_cannot_promise() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="sdpa_cudnn.*use_deterministic_algorithms"):
            check_against_definition("sdpa_cudnn", make_case("shared"), WANTED["q_and_kv"])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn"])
def test_pytorch_takes_these_arguments(name: str, rows: int) -> None:
    """On meta tensors, which run the operator's own checks of its arguments."""
    library = flash._LIBRARIES[name]()
    q = torch.empty(2, rows, 3, 16, dtype=torch.bfloat16, device="meta")
    k, v = torch.empty(2, 9, 2, 3, 16, dtype=torch.bfloat16, device="meta").unbind(2)
    out, lse = library.forward(q, k, v)
    assert (out.shape, lse.shape) == (q.shape, (2, 3, rows))
    grads = library.backward(q, q, k, v, out, lse)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_a_library_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    library = flash._LIBRARIES["sdpa_cpu"]()
    monkeypatch.setitem(flash._LIBRARIES, "sdpa_cpu", lambda: made.append("sdpa_cpu") or library)
    for _ in range(2):
        check_against_definition("sdpa_cpu", make_case("shared"), WANTED["q_and_kv"])
    assert made == ["sdpa_cpu"]


@pytest.mark.filterwarnings("error")
def test_torch_compile_takes_attention_by_name_in_one_graph() -> None:
    attention, _ = get_flash("sdpa_cpu")
    inputs = make_case("shared").inputs
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs)[0], attention(*inputs)[0])


# What is refused, and in what words.


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash'.*'sdpa_flash'"):
        get_flash("flash")


@pytest.mark.parametrize(
    ("name", "module", "source"),
    [
        ("flash_attn", "flash_attn.flash_attn_interface", "pip install flash-attn"),
        ("flash_attn_3", "flash_attn_interface", "Dao-AILab/flash-attention"),
        ("flash_attn_4", "flash_attn.cute.interface", "pip install flash-attn-4"),
    ],
)
def test_missing_package_is_named(
    name: str, module: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{name}.*{source}"):
        get_flash(name)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CUDA)
def test_dtype_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{name}'.*{str(dtype)[6:]}, want float16 or bfloat16"):
        get_flash(name)[0](*make_case("shared").to(dtype).inputs)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", CUDA)
def test_cpu_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}'.*cpu, want one on cuda"):
        get_flash(name)[0](*make_case("shared").to(torch.float16).inputs)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("name", "dim"), [(name, 12) for name in CUDA] + [("flash_attn_4", 160), ("sdpa_flash", 264)]
)
def test_head_dim_is_refused(name: str, dim: int) -> None:
    q = torch.zeros(1, 2, 1, dim, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{name}'.*head dim {dim}, want a multiple of 8"):
        get_flash(name)[0](q, q, q, None, None)


def test_out_that_was_not_kept_is_named() -> None:
    case = make_case("shared")
    attention, attention_backward = get_flash("sdpa_cpu")
    _, lse = attention(*case.inputs)
    with pytest.raises(ValueError, match="memory='compact'.*sdpa_cpu"):
        attention_backward(case.grad_out, *case.inputs, None, lse, need_q=True, need_kv=True)


def test_deterministic_mode_that_overlaps_in_two_threads_ends_as_it_was():
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    first, second = flash._deterministic(), flash._deterministic()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_deterministic_debug_mode() == 2  # the second is within
    second.__exit__(None, None, None)
    after = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before
