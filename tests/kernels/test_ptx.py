"""What `ptx` makes of kernels in PTX, and that it finds the faults it is there for."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ptx.card import _Launcher
from ptx.machine import Fault, GlobalMemory, SharedMemory
from ptx.tma import TensorMap
from ptx.translate import Kernel

NUM_THREADS = 64  # two warps


def run(body: str, data: np.ndarray, shared_bytes: int = 1024) -> np.ndarray:
    """Runs a kernel with the address of `data` in %rd1, the thread in %r1 and its bytes' place in %rd2 and
    %r2, 4 bytes of data for each thread, and a tensor map, `map`, of the first 64 as a matrix of 4x16;
    returns the data after it."""
    ptx = f"""
        .visible .entry kernel(
            .param .u64 .ptr .global .align 1 data,
            .param .align 64 .b8 map[128]
        )
        .reqntid {len(data)}
        .maxnreg 128
        {{
            .reg .pred %p<9>;
            .reg .b32 %r<99>;
            .reg .b64 %rd<9>;
            ld.param.b64 %rd1, [data];
            mov.u32 %r1, %tid.x;
            shl.b32 %r2, %r1, 2;
            cvt.u64.u32 %rd2, %r2;
            add.s64 %rd3, %rd1, %rd2;
            {body}
            ret;
        }}
    """
    kernel = Kernel(ptx)
    data = data.copy()
    memory = GlobalMemory([(data.ctypes.data, data.ctypes.data + data.nbytes)])
    with np.errstate(all="ignore"):
        kernel.run(
            shared_bytes,
            memory,
            (0, 0, 0),
            (1, 1, 1),
            [data.ctypes.data, TensorMap(data.ctypes.data, 4, (4, 16), (16, 1), (4, 16), 0)],
        )
    return data


DATA = np.arange(100, 100 + NUM_THREADS, dtype=np.uint32)


def test_threads_that_part_meet_again():
    data = run(
        """
            ld.global.b32 {%r3}, [%rd3 + 0];
            setp.lt.s32 %p1, %r1, 10;
            @%p1 bra $less;
            add.s32 %r3, %r3, 1000;
            bra $end;
        $less:
            mul.lo.s32 %r3, %r3, 2;
        $end:
            bar.sync 0;
            st.global.b32 [%rd3 + 0], {%r3};
        """,
        DATA,
    )
    assert (data == np.where(np.arange(NUM_THREADS) < 10, DATA * 2, DATA + 1000)).all()


def test_loop_that_each_thread_leaves_on_its_own():
    data = run(
        """
            mov.b32 %r3, 0;
        $again:
            add.s32 %r3, %r3, 3;
            setp.lt.s32 %p1, %r3, %r1;
            @%p1 bra $again;
            st.global.b32 [%rd3 + 0], {%r3};
        """,
        DATA,
    )
    thread = np.arange(NUM_THREADS)
    assert (data == 3 * np.maximum(1, -(-thread // 3))).all()


def test_threads_that_are_elsewhere_store_nothing():
    data = run(
        """
            setp.lt.s32 %p1, %r1, 10;
            @%p1 bra $end;
            st.global.b32 [%rd3 + 0], {%r1};
        $end:
        """,
        DATA,
    )
    assert (data == np.where(np.arange(NUM_THREADS) < 10, DATA, np.arange(NUM_THREADS))).all()


def test_register_changes_only_where_its_guard_holds():
    data = run("setp.eq.b32 %p1, %r1, 7;\n @!%p1 mov.b32 %r1, 5;\n st.global.b32 [%rd3 + 0], {%r1};", DATA)
    assert (data == np.where(np.arange(NUM_THREADS) == 7, 7, 5)).all()


def test_store_is_made_only_where_its_guard_holds():
    data = run("setp.eq.b32 %p1, %r1, 7;\n @!%p1 st.global.b32 [%rd3 + 0], {%r1};", DATA)
    assert (data == np.where(np.arange(NUM_THREADS) == 7, DATA, np.arange(NUM_THREADS))).all()


EXCHANGE = """
    st.shared.b32 [%r2 + 0], {{%r1}};
    {between}
    xor.b32 %r3, %r2, {distance};
    ld.shared.b32 {{%r4}}, [%r3 + 0];
    st.global.b32 [%rd3 + 0], {{%r4}};
"""


@pytest.mark.parametrize(
    ("between", "distance"),
    [("bar.sync 0;", 128), ("barrier.sync 0;", 128), ("", 4)],
    ids=["past a barrier", "past an unaligned barrier", "within a warp"],
)
def test_threads_exchange_what_they_know(between, distance):
    data = run(EXCHANGE.format(between=between, distance=distance), DATA)
    assert (data == np.arange(NUM_THREADS) ^ distance // 4).all()


COPY = """
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 {{%r4}}, [%r2 + 0];
    add.s32 %r4, %r4, 1;
    st.global.b32 [%rd3 + 0], {{%r4}};
"""


def test_copy_arrives_once_it_is_waited_for():
    assert (run(COPY.format(wait="cp.async.wait_group 0;"), DATA) == DATA + 1).all()


def test_copy_of_nothing_gives_zeros():
    copy = COPY.replace("0x4", "0x4, 0").format(wait="cp.async.wait_group 0;")
    assert (run(copy, DATA) == 1).all()


TWO_COPIES = """
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    cp.async.ca.shared.global [ %r2 + 256 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    cp.async.wait_group 1;
"""


def test_copies_arrive_in_their_order():
    body = TWO_COPIES + "ld.shared.b32 {%r4}, [%r2 + 0];\n add.s32 %r4, %r4, 1;\n"
    assert (run(body + "st.global.b32 [%rd3 + 0], {%r4};\n cp.async.wait_group 0;", DATA) == DATA + 1).all()


# Each warp stores a matrix of its threads' numbers, in 128 bytes from 512 times its own on.
STORE_MATRIX = "shl.b32 %r3, %r1, 4;\n stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3 + 0], {%r1};\n"
LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3 + 0];\n"
OF_ANOTHER_WARP = "xor.b32 %r3, %r3, 512;\n"


@pytest.mark.parametrize(
    ("between", "distance"),
    [("", 0), ("bar.sync 0;\n" + OF_ANOTHER_WARP, 32)],
    ids=["within a warp", "past a barrier"],
)
def test_matrix_is_loaded_as_it_was_stored(between, distance):
    data = run(STORE_MATRIX + between + LOAD_MATRIX + "st.global.b32 [%rd3 + 0], {%r4};", DATA)
    assert (data == np.arange(NUM_THREADS) ^ distance).all()


BEGIN_TILE = """
    mov.b64 %rd6, map;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r3, 0;
    mov.b32 %r5, 512;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 256;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r3], [%rd6, {%r3, %r3}], [%r5];
"""
FIRST_ROW = "{%r3, %r3}"
WAIT_FOR_TILE = """
    $wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0;
    @!%p2 bra $wait;
"""
ADD_1 = """
    ld.shared.b32 {%r4}, [%r2 + 0];
    add.s32 %r4, %r4, 1;
    st.global.b32 [%rd3 + 0], {%r4};
"""


def test_tile_arrives_once_it_is_waited_for():
    assert (run(BEGIN_TILE + WAIT_FOR_TILE + ADD_1, DATA) == DATA + 1).all()


@pytest.mark.parametrize("row", [-3, 2])
def test_tile_is_zeros_where_there_are_no_elements(row):
    data = run(BEGIN_TILE.replace(FIRST_ROW, f"{{%r3, {row}}}") + WAIT_FOR_TILE + ADD_1, DATA)
    rows = np.pad(DATA.reshape(4, 16), ((4, 4), (0, 0)))[4 + row : 8 + row]
    assert (data == rows.reshape(-1) + 1).all()


def test_tile_of_a_map_beyond_its_tensor_is_found():
    with pytest.raises(Fault, match="TMA load: 32 accesses are outside of all tensors"):
        run(BEGIN_TILE, DATA[:32])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"address": 8}, "not aligned"),
        ({"strides": (17, 1)}, "not aligned"),
        ({"strides": (16, 2)}, "not aligned"),
        ({"box": (4, 15)}, "not aligned"),
        ({"swizzle": 1}, "rows of 64 bytes, more than the swizzle's 32"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_tensor_map_that_no_gpu_takes_is_found(changed, message):
    good = dict(address=0, element_size=4, shape=(4, 16), strides=(16, 1), box=(4, 16), swizzle=2)
    TensorMap(**good)
    with pytest.raises(Fault, match=message):
        TensorMap(**(good | changed))


STORE_TILE = """
    mov.b64 %rd6, map;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r3, 0;
    st.shared.b32 [%r2 + 0], {%r1};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd6, {%r3, %r3}], [%r3];
    cp.async.bulk.commit_group;
"""
WAIT_FOR_STORE = "cp.async.bulk.wait_group.read 0;"
CLEAR = "bar.sync 0;\n mov.b32 %r4, 0;\n st.shared.b32 [%r2 + 0], {%r4};\n bar.sync 0;"


def test_tile_is_stored_once_it_is_waited_for():
    assert (run(STORE_TILE + WAIT_FOR_STORE + CLEAR, DATA) == np.arange(NUM_THREADS)).all()


# Ones (64, 16) by ones (16, 8), in bfloat16, of a warpgroup; every sum is 16, which is stored.
FILL = """
    mov.b32 %r3, 0x3f803f80;
    shl.b32 %r4, %r1, 4;
    st.shared.v4.b32 [%r4 + 0], {%r3, %r3, %r3, %r3};
    st.shared.b32 [%r2 + 2048], {%r3};
    fence.proxy.async.shared::cta;
"""
BEGIN_PRODUCT = """
    mov.b64 %rd4, 0x1000080000;
    mov.b64 %rd5, 0x1000080080;
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    mov.b32 %r12, 0;
    mov.b32 %r13, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd4, %rd5, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
"""
WAIT_FOR_PRODUCT = "wgmma.wait_group.sync.aligned 0;"
STORE_SUM = "st.global.b32 [%rd3 + 0], {%r10};"
CLEAR_RIGHT = "st.shared.b32 [%r2 + 2048], {%r10};"
OF_A_WARPGROUP = np.arange(128, dtype=np.uint32)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((WAIT_FOR_PRODUCT, STORE_SUM), 16.0),
        ((STORE_SUM, WAIT_FOR_PRODUCT), 0.0),
    ],
    ids=["waited for", "used too early"],
)
def test_product_arrives_once_it_is_waited_for(steps, expected):
    data = run("\n".join((FILL, "bar.sync 0;", BEGIN_PRODUCT, *steps)), OF_A_WARPGROUP, 2560)
    assert (data.view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FILL + "bar.sync 0;", "", "wgmma: nobody waits for it"),
        (FILL, WAIT_FOR_PRODUCT, "wgmma: reads what another warp writes"),
        (
            FILL.replace("fence.proxy.async.shared::cta;", "bar.sync 0;"),
            WAIT_FOR_PRODUCT,
            "wgmma: reads what threads have written, with no fence between",
        ),
        ("", FILL + "bar.sync 0;" + WAIT_FOR_PRODUCT, "wgmma: reads shared memory that nobody"),
        (
            FILL + "bar.sync 0;",
            "bar.sync 0;" + CLEAR_RIGHT + WAIT_FOR_PRODUCT,
            "st.shared: writes what an operation in flight reads",
        ),
        (
            FILL + "bar.sync 0;",
            "bar.sync 0;" + WAIT_FOR_PRODUCT + CLEAR_RIGHT,
            "st.shared: writes what another warp reads",
        ),
    ],
    ids=[
        "not waited for",
        "no barrier before",
        "no fence before",
        "operands that come later",
        "operands overwritten",
        "no barrier after",
    ],
)
def test_fault_of_a_product_is_found(before, after, message):
    with pytest.raises(Fault, match=message):
        run(before + BEGIN_PRODUCT + after, OF_A_WARPGROUP, 2560)


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ("mov.b64 %rd5, 0x10000800a0;", "an operand past the end of shared memory"),
        ("add.s64 %rd5, %rd5, %rd2;", "a warpgroup's threads have different descriptors"),
    ],
    ids=["past the end", "several"],
)
def test_fault_of_a_descriptor_is_found(right, message):
    begin = BEGIN_PRODUCT.replace("mov.b32 %r10, 0;", "mov.b32 %r10, 0;\n" + right)
    with pytest.raises(Fault, match=message):
        run(FILL + "bar.sync 0;" + begin, OF_A_WARPGROUP, 2560)


# Two warpgroups that go their own ways: the first tells the second its threads' numbers.
WARPGROUPS = """
    setp.lt.u32 %p1, %r1, 128;
    setp.eq.u32 %p3, %r1, 0;
    mov.b32 %r5, 2048;
    @%p3 mbarrier.init.shared::cta.b64 [%r5], 1;
    bar.sync 0;
    @%p1 bra $first;
    setmaxnreg.inc.sync.aligned.u32 192;
    {second}
    bra $end;
    $first:
    setmaxnreg.dec.sync.aligned.u32 64;
    {first}
    $end:
"""
TELL = "st.shared.b32 [%r2 + 0], {%r1};\n"
BARRIER_OF_FIRST = "bar.sync 1, 128;\n"
ARRIVE = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r5];\n"
LISTEN = "ld.shared.b32 {%r3}, [%r2 + -512];\n st.global.b32 [%rd3 + 0], {%r3};\n"
OF_TWO_WARPGROUPS = np.arange(1000, 1256, dtype=np.uint32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TELL + BARRIER_OF_FIRST + ARRIVE, WAIT_FOR_TILE + LISTEN),
        (TELL + "bar.sync 2, 256;", "bar.sync 2, 256;\n" + LISTEN),
        (TELL + "barrier.sync 2;", "barrier.sync 2;\n" + LISTEN),
    ],
    ids=["mbarrier", "barrier of so many", "barrier of all"],
)
def test_warpgroup_reads_what_another_hands_over(first, second):
    data = run(WARPGROUPS.format(first=first, second=second), OF_TWO_WARPGROUPS, 4096)
    assert (data[128:] == np.arange(128)).all() and (data[:128] == OF_TWO_WARPGROUPS[:128]).all()


BEGIN_TILE_OF_FIRST = """
    mov.b64 %rd6, map;
    mov.b32 %r6, 3072;
    @%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 256;
    @%p3 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r6], [%rd6, {%r1, %r1}], [%r5];
"""
LISTEN_TO_TILE = "ld.shared.b32 {%r3}, [%r6 + 0];\n st.global.b32 [%rd3 + 0], {%r3};"
READ_FIRST = "mov.b32 %r6, 3072;\n" + LISTEN_TO_TILE

FAULTS_OF_WARPGROUPS = {
    "not waited for": (TELL + BARRIER_OF_FIRST + ARRIVE, LISTEN, "ld.shared: reads what another warp writes"),
    "no barrier before the arrival": (
        TELL + ARRIVE,
        WAIT_FOR_TILE + LISTEN,
        "ld.shared: reads what another warp writes",
    ),
    "a barrier of the others": (
        TELL + BARRIER_OF_FIRST,
        "bar.sync 2, 128;\n" + LISTEN,
        "ld.shared: reads what another warp writes",
    ),
    "a write over what is being told": (
        TELL + BARRIER_OF_FIRST + ARRIVE,
        "st.shared.b32 [%r2 + -512], {%r1};",
        "st.shared: writes what another warp writes",
    ),
    "a write over what the other reads": (
        TELL + BARRIER_OF_FIRST + "ld.shared.b32 {%r3}, [%r2 + 0];\n" + ARRIVE,
        WAIT_FOR_TILE + "st.shared.b32 [%r2 + -512], {%r1};",
        "st.shared: writes what another warp reads",
    ),
    "a tile that another has waited for": (
        BEGIN_TILE_OF_FIRST + WAIT_FOR_TILE,
        READ_FIRST,
        "ld.shared: reads what another warp writes",
    ),
    "nobody arrives": (TELL, WAIT_FOR_TILE, "wait for ever"),
    "nobody comes to the barrier": ("", "bar.sync 2, 256;", "wait for ever"),
    "too many come to the barrier": ("", "bar.sync 2, 64;", "bar.sync: 128 threads at a barrier of 64"),
    "registers that increase to fewer": (
        "setmaxnreg.inc.sync.aligned.u32 56;",
        "",
        "setmaxnreg.inc: from 64 registers to 56",
    ),
    "registers that decrease to more": (
        "setmaxnreg.dec.sync.aligned.u32 72;",
        "",
        "setmaxnreg.dec: from 64 registers to 72",
    ),
    "more registers than there are": ("setmaxnreg.inc.sync.aligned.u32 200;", "", "wait for ever"),
}


@pytest.mark.parametrize(
    ("first", "second", "message"), FAULTS_OF_WARPGROUPS.values(), ids=FAULTS_OF_WARPGROUPS
)
def test_fault_between_warpgroups_is_found(first, second, message):
    with pytest.raises(Fault, match=message):
        run(WARPGROUPS.format(first=first, second=second), OF_TWO_WARPGROUPS, 4096)


def test_tile_is_read_by_another_warpgroup_that_waits_too():
    second = WAIT_FOR_TILE.replace("$wait", "$again") + READ_FIRST
    data = run(
        WARPGROUPS.format(first=BEGIN_TILE_OF_FIRST + WAIT_FOR_TILE, second=second), OF_TWO_WARPGROUPS, 4096
    )
    assert (data[128:] == OF_TWO_WARPGROUPS[0]).all()


def test_registers_are_divided_only_where_the_kernel_says_how_many_it_begins_with():
    with pytest.raises(Fault, match="setmaxnreg: in a kernel without .maxnreg"):
        Kernel(".visible .entry kernel()\n.reqntid 128\n{ setmaxnreg.dec.sync.aligned.u32 64; ret; }")


FAULTS = {
    "a load past the end": ("ld.global.b32 {%r3}, [%rd3 + 4];", "1 accesses are outside of all tensors"),
    "a store before the start": ("st.global.b32 [%rd3 + -4], {%r1};", "1 accesses are outside"),
    "a byte past the end": ("ld.global.b8 {%rs1}, [%rd1 + 256];", "64 accesses are outside"),
    "a vector that is not aligned": ("ld.global.v2.b32 {%r3, %r4}, [%rd1 + 4];", "not a multiple of 8"),
    "a stored vector that is not aligned": (
        "st.global.v2.b32 [%rd1 + 4], {%r1, %r1};",
        "not a multiple of 8",
    ),
    "two values in one place": ("st.global.b32 [%rd1 + 0], {%r1};", "different values in one place"),
    "shared memory that is not written": ("ld.shared.b32 {%r3}, [%r2 + 0];", "that nobody has written"),
    "shared memory that is not aligned": ("ld.shared.b32 {%r3}, [%r2 + 2];", "not a multiple of 4 bytes"),
    "shared memory before its start": ("st.shared.b32 [%r2 + -4], {%r1};", "shared memory has 1024 bytes"),
    "shared memory right past its end": (
        "mov.b32 %r3, 1024;\n st.shared.b32 [%r3 + 0], {%r3};",
        "shared memory has 1024 bytes",
    ),
    "shared memory past its end": ("st.shared.b32 [%r2 + 1024], {%r1};", "shared memory has 1024 bytes"),
    "a read with no barrier": (EXCHANGE.format(between="", distance=128), "another warp writes"),
    "a write with no barrier": (
        EXCHANGE.format(between="bar.sync 0;", distance=128) + "st.shared.b32 [%r2 + 0], {%r1};",
        "another warp reads",
    ),
    "two warps write one place": (
        "mov.b32 %r3, 0;\n st.shared.b32 [%r3 + 0], {%r1};",
        "different values in one place",
    ),
    "two warps that write one place in turn": (
        "mov.b32 %r3, 0;\n setp.lt.s32 %p1, %r1, 32;\n"
        "@%p1 st.shared.b32 [%r3 + 0], {%r3};\n @!%p1 st.shared.b32 [%r3 + 0], {%r3};",
        "another warp writes",
    ),
    "a write of what warps read in turn": (
        "mov.b32 %r3, 0;\n setp.lt.s32 %p1, %r1, 32;\n @%p1 st.shared.b32 [%r3 + 0], {%r3};\n bar.sync 0;\n"
        "@%p1 ld.shared.b32 {%r4}, [%r3 + 0];\n @!%p1 ld.shared.b32 {%r4}, [%r3 + 0];\n"
        "@!%p1 st.shared.b32 [%r3 + 0], {%r3};",
        "another warp reads",
    ),
    "a matrix that nobody has stored": ("shl.b32 %r3, %r1, 4;\n" + LOAD_MATRIX, "ldmatrix: .* nobody"),
    "a matrix of another warp": (STORE_MATRIX + OF_ANOTHER_WARP + LOAD_MATRIX, "ldmatrix: .* another warp"),
    "a matrix over that of another warp": (
        STORE_MATRIX + OF_ANOTHER_WARP + STORE_MATRIX.split("\n")[1],
        "stmatrix: writes what another warp",
    ),
    "a matrix that is not aligned": ("shl.b32 %r3, %r1, 3;\n" + LOAD_MATRIX, "not a multiple of 16"),
    "a copy past the end": (COPY.replace("%rd3 + 0 ]", "%rd3 + 4 ]").format(wait=""), "cp.async: 1 accesses"),
    "a copy to past the end": (COPY.replace("%r2 + 0 ]", "%r2 + 1024 ]").format(wait=""), "1024 bytes"),
    "a copy of a part": (COPY.replace("0x4", "0x4, 2").format(wait=""), "cp.async: copies a part"),
    "a copy over what was there, not waited for": (
        "st.shared.b32 [%r2 + 0], {%r1};\n bar.sync 0;" + COPY.format(wait=""),
        "that nobody has written",
    ),
    "a later copy that is not waited for": (
        TWO_COPIES + "ld.shared.b32 {%r4}, [%r2 + 256];",
        "that nobody has written",
    ),
    "a copy that is not waited for": (COPY.format(wait=""), "that nobody has written"),
    "a copy in flight at the end": (
        "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;\n cp.async.commit_group;",
        "cp.async: nobody waits for it",
    ),
    "a write of what several warps read": (
        "mov.b32 %r3, 0;\n setp.eq.b32 %p1, %r1, 0;\n @%p1 st.shared.b32 [%r3 + 0], {%r1};\n bar.sync 0;\n"
        "ld.shared.b32 {%r4}, [%r3 + 0];\n"
        "setp.eq.b32 %p1, %r1, 63;\n @%p1 st.shared.b32 [%r3 + 0], {%r1};",
        "another warp reads",
    ),
    "a copy that is not committed": (
        "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;",
        "cp.async: nobody waits for it",
    ),
    "a tile that is not waited for": (BEGIN_TILE + ADD_1, "that nobody has written"),
    "a tile in flight at the end": (BEGIN_TILE, "TMA load: nobody waits for it"),
    "a tile whose barrier goes before it arrives": (
        BEGIN_TILE + "@%p1 mbarrier.inval.shared::cta.b64 [%r5];",
        "mbarrier.inval: a copy is on its way",
    ),
    "a tile over what others read": (
        "st.shared.b32 [%r2 + 0], {%r1};\n bar.sync 0;\n ld.shared.b32 {%r4}, [%r2 + 0];"
        + BEGIN_TILE.replace("bar.sync 0;", ""),
        "TMA load: writes what another warp reads",
    ),
    "a tile of fewer bytes than are expected": (
        BEGIN_TILE.replace("256", "512") + WAIT_FOR_TILE,
        "wait for ever",
    ),
    "a tile with too few arrivals": (
        BEGIN_TILE.replace("[%r5], 1;", "[%r5], 2;") + WAIT_FOR_TILE,
        "wait for ever",
    ),
    "a tile that is not aligned": (
        BEGIN_TILE.replace("[%r3], [%rd6", "[%r3 + 64], [%rd6"),
        "multiple of 128",
    ),
    "an mbarrier that several threads make": (
        BEGIN_TILE.replace("@%p1 mbarrier.init", "mbarrier.init"),
        "mbarrier.init: by 64 threads",
    ),
    "a stored tile that nobody has written": (
        STORE_TILE.replace("st.shared.b32 [%r2 + 0], {%r1};", ""),
        "TMA store: reads shared memory that nobody",
    ),
    "a stored tile with no fence before": (
        STORE_TILE.replace("fence.proxy.async.shared::cta;", ""),
        "TMA store: reads what threads have written, with no fence between",
    ),
    "a stored tile with no barrier before": (
        STORE_TILE.replace("bar.sync 0;", ""),
        "TMA store: reads what another warp writes",
    ),
    "a write in a tile that is being stored": (
        STORE_TILE + "bar.sync 0;\n st.shared.b32 [%r2 + 0], {%r3};" + WAIT_FOR_STORE,
        "st.shared: writes what an operation in flight reads",
    ),
    "a stored tile in flight at the end": (STORE_TILE, "TMA store: nobody waits for it"),
    "a barrier that some do not reach": (
        "setp.lt.s32 %p1, %r1, 10;\n @%p1 bra $end;\n bar.sync 0;\n $end:",
        "not all threads reach it",
    ),
    "an unaligned barrier that some do not reach": (
        "setp.lt.s32 %p1, %r1, 10;\n @%p1 bra $end;\n barrier.sync 0;\n $end:",
        "not all threads reach it",
    ),
    "an mbarrier that nobody arrives at": (
        "setp.eq.b32 %p1, %r1, 0;\n mov.b32 %r3, 0;\n"
        "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n bar.sync 0;\n"
        "mov.b32 %r5, %r3;\n" + WAIT_FOR_TILE,
        "wait for ever",
    ),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_found(body, message):
    with pytest.raises(Fault, match=message):
        run(body, DATA)


def test_launch_may_touch_the_storages_of_its_tensors_and_no_more():
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "eps": "fp32", "BLOCK": "constexpr"}
    launcher = _Launcher(SimpleNamespace(signature=signature), SimpleNamespace(tensordesc_meta=None))
    x, y = torch.zeros(10), torch.zeros(20)
    parameters, memory = launcher._parameters((x[4:], y, -3, 1.0, 16))
    assert parameters == [x.data_ptr() + 16, y.data_ptr(), -3, 0x3F800000, 0, 0]
    ranges = {(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, y)}
    assert {*zip(memory.starts.tolist(), memory.ends.tolist(), strict=True)} == ranges


def test_write_to_what_a_product_in_flight_reads_is_a_fault():
    shared, places = SharedMemory(64), np.arange(32)
    shared.write(places, 0, np.zeros(32, np.uint8), "st.shared")
    shared.fence()
    shared.use(places, 0, "wgmma")
    with pytest.raises(Fault, match="st.shared: writes what an operation in flight reads"):
        shared.write(places[:4], 0, np.ones(4, np.uint8), "st.shared")
    assert (shared.end_use(places) == 0).all()
    shared.write(places[:4], 0, np.ones(4, np.uint8), "st.shared")


def test_numbers_of_two_types_are_added_in_the_wider_one():
    data = run(
        """
            mov.b16 %rs1, 16256;
            ld.global.b32 {%r3}, [%rd3 + 0];
            add.rn.f32.bf16 %r4, %rs1, %r3;
            fma.rn.f32.bf16 %r5, %rs1, %rs1, %r4;
            st.global.b32 [%rd3 + 0], {%r5};
        """,
        DATA.astype(np.float32).view(np.uint32),
    )
    assert (data.view(np.float32) == DATA + 2).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "popc.b32 %r3, %r1",
        "cvt.rzi.s32.f32 %r3, %r1",
        "cvt.sat.s8.s32 %r3, %r1",
        "max.NaN.f32 %r3, %r1, %r1",
        "mul.hi.u32 %r3, %r1, %r1",
        "barrier.arrive 1, 64",
        "atom.global.add.u32 %r3, [%rd1], %r1",
    ],
)
def test_unknown_instruction_is_named(instruction):
    with pytest.raises(NotImplementedError, match=re.escape(instruction)):
        run(f"{instruction};", DATA)
