"""What `ptx` makes of kernels in PTX, and that it finds the faults it is there for."""

from __future__ import annotations

import re

import numpy as np
import pytest
from ptx.machine import Block, Fault, GlobalMemory, SharedMemory
from ptx.translate import Kernel

NUM_THREADS = 64  # two warps


def run(body: str, data: np.ndarray, shared_bytes: int = 1024) -> np.ndarray:
    """Runs a kernel with the address of `data` in %rd1, the thread in %r1 and its bytes' place in %rd2 and
    %r2, and 4 bytes of data for each thread; returns the data after it."""
    ptx = f"""
        .visible .entry kernel(
            .param .u64 .ptr .global .align 1 data
        )
        .reqntid {NUM_THREADS}
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
                NUM_THREADS,
                shared_bytes,
                memory,
                (0, 0, 0),
                (1, 1, 1),
                [data.ctypes.data],
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


def test_write_to_what_a_product_in_flight_reads_is_a_fault():
    shared, places = SharedMemory(64), np.arange(32)
    shared.write(places, 0, np.zeros(32, np.uint8), "st.shared")
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
        "bar.sync 1, 32",
        "atom.global.add.u32 %r3, [%rd1], %r1",
    ],
)
def test_unknown_instruction_is_named(instruction):
    with pytest.raises(NotImplementedError, match=re.escape(instruction)):
        run(f"{instruction};", DATA)
