"""What `ptx` makes of kernels in PTX, and that it finds the faults it is there for."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.machine import Block, Fault, GlobalMemory
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
            Block(
                len(data),
                shared_bytes,
                memory,
                (0, 0, 0),
                (1, 1, 1),
                [data.ctypes.data, TensorMap(data.ctypes.data, 4, (4, 16), (16, 1), (4, 16), 0)],
                kernel.num_registers,
            )
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
    ("between", "distance"), [("bar.sync 0;", 128), ("", 4)], ids=["past a barrier", "within a warp"]
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
WAIT_FOR_TILE = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0;"
ADD_1 = """
    ld.shared.b32 {%r4}, [%r2 + 0];
    add.s32 %r4, %r4, 1;
    st.global.b32 [%rd3 + 0], {%r4};
"""


def test_tile_arrives_once_it_is_waited_for():
    assert (run(BEGIN_TILE + WAIT_FOR_TILE + ADD_1, DATA) == DATA + 1).all()


STORE_TILE = """
    mov.b64 %rd6, map;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r3, 0;
    st.shared.b32 [%r2 + 0], {%r1};
    bar.sync 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd6, {%r3, %r3}], [%r3];
    cp.async.bulk.commit_group;
"""
WAIT_FOR_STORE = "cp.async.bulk.wait_group.read 0;"
CLEAR = "bar.sync 0;\n mov.b32 %r4, 0;\n st.shared.b32 [%r2 + 0], {%r4};\n bar.sync 0;"


def test_stored_tile_is_what_lies_there_until_it_is_waited_for():
    assert (run(STORE_TILE + WAIT_FOR_STORE + CLEAR, DATA) == np.arange(NUM_THREADS)).all()
    assert (run(STORE_TILE + CLEAR + WAIT_FOR_STORE, DATA) == 0).all()


# Ones (64, 16) by ones (16, 8), in bfloat16, of a warpgroup; every sum is 16, which is stored.
FILL = """
    mov.b32 %r3, 0x3f803f80;
    shl.b32 %r4, %r1, 4;
    st.shared.v4.b32 [%r4 + 0], {%r3, %r3, %r3, %r3};
    st.shared.b32 [%r2 + 2048], {%r3};
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
CLEAR_RIGHT = "bar.sync 0;\n st.shared.b32 [%r2 + 2048], {%r10};\n bar.sync 0;"
OF_A_WARPGROUP = np.arange(128, dtype=np.uint32)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((WAIT_FOR_PRODUCT, STORE_SUM), 16.0),
        ((STORE_SUM, WAIT_FOR_PRODUCT), 0.0),
        ((CLEAR_RIGHT, WAIT_FOR_PRODUCT, STORE_SUM), 0.0),
    ],
    ids=["waited for", "used too early", "of what is overwritten"],
)
def test_product_arrives_once_it_is_waited_for(steps, expected):
    data = run("\n".join((FILL, "bar.sync 0;", BEGIN_PRODUCT, *steps)), OF_A_WARPGROUP, 2560)
    assert (data.view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FILL + "bar.sync 0;", "", "wgmma: nobody waits for it"),
        (FILL, WAIT_FOR_PRODUCT, "wgmma: reads what another warp writes"),
        ("", FILL + "bar.sync 0;" + WAIT_FOR_PRODUCT, "wgmma: reads shared memory that nobody"),
    ],
    ids=["not waited for", "no barrier before", "operands that come later"],
)
def test_fault_of_a_product_is_found(before, after, message):
    with pytest.raises(Fault, match=message):
        run(before + BEGIN_PRODUCT + after, OF_A_WARPGROUP, 2560)


FAULTS = {
    "a load past the end": ("ld.global.b32 {%r3}, [%rd3 + 4];", "1 accesses are outside of all tensors"),
    "a store before the start": ("st.global.b32 [%rd3 + -4], {%r1};", "1 accesses are outside"),
    "a vector that is not aligned": ("ld.global.v2.b32 {%r3, %r4}, [%rd1 + 4];", "not a multiple of 8"),
    "two values in one place": ("st.global.b32 [%rd1 + 0], {%r1};", "different values in one place"),
    "shared memory that is not written": ("ld.shared.b32 {%r3}, [%r2 + 0];", "that nobody has written"),
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
    "a stored tile in flight at the end": (STORE_TILE, "TMA store: nobody waits for it"),
    "a barrier that some do not reach": (
        "setp.lt.s32 %p1, %r1, 10;\n @%p1 bra $end;\n bar.sync 0;\n $end:",
        "not all threads reach it",
    ),
    "an mbarrier that nobody arrives at": (
        "setp.eq.b32 %p1, %r1, 0;\n mov.b32 %r3, 0;\n"
        "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n bar.sync 0;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;",
        "wait for ever",
    ),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_fault_is_found(body, message):
    with pytest.raises(Fault, match=message):
        run(body, DATA)


def test_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match="popc.b32 %r3, %r1"):
        run("popc.b32 %r3, %r1;", DATA)
