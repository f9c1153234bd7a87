"""A program's threads: their registers, shared memory and what is in flight; and global memory.

A register is an array of unsigned integers, one per thread, or one for all. `mask` says which threads are on
their way where they have parted, None: all."""

from __future__ import annotations

import copy
import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WARP = 32
NOBODY, SEVERAL = -1, -2  # in place of a warp's number
LANES, COLUMNS = 128, 512  # of tensor memory
MBARRIERS = 64  # of a program, at most
NAN_BYTE = 0xFF  # what memory is filled with: NaN in every floating-point type


class Fault(Exception):
    """What a GPU may do anything about, or what nothing here needs."""


def bytes_at(addresses: np.ndarray, size: int) -> np.ndarray:
    """(n, size) addresses of the bytes."""
    return addresses[:, None] + np.arange(size)


class GlobalMemory:
    """This process's memory, of which a kernel may touch `ranges`, first and past the last address."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        ranges = sorted(ranges)
        self.starts, self.ends = np.array(ranges, np.int64).reshape(-1, 2).T
        self.base = int(self.starts.min()) // 16 * 16
        size = int(self.ends.max()) - self.base
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))

    def require(self, addresses: np.ndarray, size: int, alignment: int, what: str) -> None:
        """Faults unless each `size` bytes lie in one of the ranges."""
        if (addresses % alignment).any():
            raise Fault(f"{what}: an address is not a multiple of {alignment} bytes")
        place = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (place < 0) | (addresses + size > self.ends[place])
        if outside.any():
            raise Fault(f"{what}: {outside.sum()} accesses are outside of all tensors")

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n, size) places in `bytes`."""
        return bytes_at(addresses - self.base, size)


class SharedMemory:
    """Shared memory, with who has accessed a byte last, and when.

    Each group of threads counts its barriers: `time`. `seen` has, for each group, before which time of every
    group it sees what that one did, since both have passed a barrier, or an mbarrier, directly or by way of
    others. What TMA writes is seen by who has waited for its mbarrier, which counts like a group.

    Args:
        size: in bytes.
        num_groups: of threads.
        warps: in a group.
    """

    def __init__(self, size: int, num_groups: int = 1, warps: int = 32) -> None:
        size += -size % 16
        self.bytes = np.full(size, NAN_BYTE, np.uint8)
        self.is_written = np.zeros(size, bool)
        self.is_fenced = np.ones(size, bool)  # against asynchronous operations
        self.writer, self.write_time = np.full(size, NOBODY), np.full(size, -1)
        self.reader, self.read_time = np.full((num_groups, size), NOBODY), np.full((num_groups, size), -1)
        self.in_use = np.zeros(size, int)  # by how many operations in flight that read it
        self.seen = np.zeros((num_groups, num_groups + MBARRIERS), int)
        self.group_of = np.concatenate(
            [np.repeat(np.arange(num_groups), warps), num_groups + np.arange(MBARRIERS)]
        )
        self.warps, self.group = warps, 0

    def of(self, group: int) -> SharedMemory:
        """The same memory, as a group accesses it, whose warps count from 0."""
        found = copy.copy(self)
        found.group = group
        return found

    @property
    def time(self) -> int:
        return int(self.seen[self.group, self.group])

    def name_of(self, warps: np.ndarray | int) -> np.ndarray | int:
        """This group's warps among all."""
        return warps + self.warps * self.group

    def require(self, addresses: np.ndarray, size: int, what: str) -> None:
        if (addresses % size).any():
            raise Fault(f"{what}: a shared address is not a multiple of {size} bytes")
        if (addresses + size > len(self.bytes)).any():  # they are of 32 bits, and never negative
            raise Fault(f"{what}: shared memory has {len(self.bytes)} bytes")

    def _are_writes_unseen(self, places: np.ndarray, warps: np.ndarray | int) -> bool:
        writers = self.writer[places]
        unseen = self.write_time[places] >= self.seen[self.group][self.group_of[writers]]
        return bool((unseen & (writers != self.name_of(warps))).any())

    def require_written(self, places: np.ndarray, warps: np.ndarray | int, what: str) -> None:
        """Faults unless `warps`, of the same shape or one, may read."""
        if not self.is_written[places].all():
            raise Fault(f"{what}: reads shared memory that nobody has written")
        if self._are_writes_unseen(places, warps):
            raise Fault(f"{what}: reads what another warp writes, with no barrier between")

    def read(self, places: np.ndarray, warps: np.ndarray | int, what: str) -> np.ndarray:
        """The bytes at `places`, read by `warps`."""
        self.require_written(places, warps, what)
        reader, read_time = self.reader[self.group], self.read_time[self.group]
        others = (read_time[places] == self.time) & (reader[places] != warps)
        readers = np.where(others, SEVERAL, warps)
        reader[places] = readers
        reader[places[reader[places] != readers]] = SEVERAL  # that read in this very moment
        read_time[places] = self.time
        return self.bytes[places]

    def use(self, places: np.ndarray, warp: int, what: str) -> None:
        """An operation begins that reads them until it ends."""
        if places.max() >= len(self.bytes):
            raise Fault(f"{what}: an operand past the end of shared memory")
        self.require_written(places, warp, what)
        if not self.is_fenced[places].all():
            raise Fault(f"{what}: reads what threads have written, with no fence between")
        np.add.at(self.in_use, places, 1)

    def end_use(self, places: np.ndarray) -> np.ndarray:
        """What the operation has read."""
        np.add.at(self.in_use, places, -1)
        return self.bytes[places]

    def require_free(self, places: np.ndarray, warps: np.ndarray | int, what: str) -> None:
        """Faults where another warp has accessed them since the last barrier, or an operation reads them."""
        if self.in_use[places].any():
            raise Fault(f"{what}: writes what an operation in flight reads")
        for group, (reader, read_time) in enumerate(zip(self.reader, self.read_time, strict=True)):
            unseen = read_time[places] >= self.seen[self.group, group]
            if (unseen & (True if group != self.group else reader[places] != warps)).any():
                raise Fault(f"{what}: writes what another warp reads, with no barrier between")
        if self._are_writes_unseen(places, warps):
            raise Fault(f"{what}: writes what another warp writes, with no barrier between")

    def write(self, places: np.ndarray, warps: np.ndarray | int, data: np.ndarray, what: str) -> None:
        self.require_free(places, warps, what)
        self.bytes[places] = data
        self.is_written[places] = True
        self.is_fenced[places] = False
        self.writer[places], self.write_time[places] = self.name_of(warps), self.time
        if (self.bytes[places] != data).any():
            raise Fault(f"{what}: threads write different values in one place")

    def expect(self, places: np.ndarray, warps: np.ndarray | int, what: str) -> None:
        """Data are on their way there: nobody may read before they are waited for."""
        self.require_free(places, warps, what)
        self.is_written[places] = False

    def receive(self, places: np.ndarray, data: np.ndarray, barrier: Barrier) -> None:
        """Data that this mbarrier counts are there."""
        self.bytes[places] = data
        self.is_written[places] = self.is_fenced[places] = True
        self.writer[places] = self.warps * len(self.reader) + barrier.number
        self.write_time[places] = barrier.phase

    def fence(self) -> None:
        """Asynchronous operations may read what this group has written, or sees."""
        groups = self.group_of[self.writer]
        self.is_fenced |= (groups == self.group) | (self.write_time < self.seen[self.group][groups])

    def meet(self, groups: list[int]) -> None:
        """A barrier of these groups."""
        self.seen[groups] = self.seen[groups].max(axis=0)
        for group in groups:
            self.seen[groups, group] += 1

    def learn(self, barrier: Barrier) -> None:
        """This group has waited for an mbarrier."""
        own = self.seen[self.group]
        np.maximum(own, barrier.published, out=own)
        own[len(self.reader) + barrier.number] = barrier.phase


@dataclass
class Barrier:
    """An mbarrier: a phase ends when `pending` arrivals and `bytes_pending` are at 0. in_flight: copies that
    count towards it; commits: tcgen05's, which arrive when the products before them have ended; number: among
    the program's; arrived, published: what those who have arrived have seen, and those of whole phases."""

    count: int
    pending: int
    number: int
    arrived: np.ndarray
    published: np.ndarray
    bytes_pending: int = 0
    phase: int = 0
    in_flight: list[Callable[[], None]] = field(default_factory=list)
    commits: list[Callable[[], None]] = field(default_factory=list)

    def settle(self) -> None:
        if self.pending == 0 and self.bytes_pending == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.published = self.arrived.copy()


class Groups:
    """Asynchronous operations, which end in the order of their groups."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.committed: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until at most so many groups are in flight."""
        while len(self.committed) > pending:
            for operation in self.committed.pop(0):
                operation()


class TensorMemory:
    """allocated: columns from 0 on. products: those in flight, in the order in which they end."""

    def __init__(self) -> None:
        self.words = np.full((LANES, COLUMNS, 4), NAN_BYTE, np.uint8).view(np.uint32)[..., 0]
        self.allocated = 0
        self.products: list[Callable[[], None]] = []

    def require(self, last_column: int) -> None:
        if last_column > self.allocated:
            raise Fault(f"tcgen05: column {last_column} of {self.allocated} that are allocated")


class Program:
    """What the threads of a program share, and its groups of threads.

    Args:
        num_threads, shared_bytes: of the program.
        memory: global memory.
        place, grid: its place among all, along three axes.
        parameters: the kernel's, as Python numbers, or a `tma.TensorMap`.
        num_registers: of a thread, in PTX.
        group_size: threads that are in step; the others go their own way.
        max_registers: of a thread, on the GPU, when the program begins.
    """

    def __init__(
        self,
        num_threads: int,
        shared_bytes: int,
        memory: GlobalMemory,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: list[Any],
        num_registers: int,
        group_size: int,
        max_registers: int,
    ) -> None:
        self.num_threads, self.memory, self.parameters = num_threads, memory, parameters
        self.barriers: dict[int, Barrier] = {}
        self.barrier_numbers = itertools.count()
        self.tensor_memory = TensorMemory()
        self.nanoseconds = 0
        self.special: dict[str, Any] = {}
        for axis, index, size in zip("xyz", place, grid, strict=True):
            self.special |= {f"%ctaid.{axis}": np.uint32(index), f"%nctaid.{axis}": np.uint32(size)}
        self.num_events = 0  # that others may wait for, beside mbarriers' phases
        self.meetings: dict[int, list[Block]] = {}  # who waits, for each of the barriers with a number
        self.free_registers = 0
        num_groups = num_threads // group_size
        shared = SharedMemory(shared_bytes, num_groups, group_size // WARP)
        self.blocks = [
            Block(self, shared.of(group), group_size, num_registers, max_registers)
            for group in range(num_groups)
        ]

    @property
    def progress(self) -> int:
        """Changes when something happens that a group of threads may have to wait for."""
        return self.num_events + sum(barrier.phase for barrier in self.barriers.values())

    def require_end(self) -> None:
        """Nothing is in flight that was not waited for."""
        for block in self.blocks:
            for groups, what in (
                (block.copies, "cp.async"),
                (block.products, "wgmma"),
                (block.stores, "TMA store"),
            ):
                if groups.open or any(groups.committed):
                    raise Fault(f"{what}: nobody waits for it")
        if self.tensor_memory.products:
            raise Fault("tcgen05.mma: nobody waits for it")
        if any(barrier.in_flight for barrier in self.barriers.values()):
            raise Fault("TMA load: nobody waits for it")


class Block:
    """Threads of a program that are in step."""

    def __init__(
        self,
        program: Program,
        shared: SharedMemory,
        num_threads: int,
        num_registers: int,
        max_registers: int,
    ) -> None:
        self.program, self.shared, self.num_threads = program, shared, num_threads
        self.memory, self.parameters = program.memory, program.parameters
        self.barriers, self.tensor_memory = program.barriers, program.tensor_memory
        self.registers: list[Any] = [np.uint32(0xDEADBEEF)] * num_registers
        self.max_registers = max_registers
        thread = np.arange(num_threads)
        self.warp, self.lane = thread // WARP, thread % WARP
        self.mask: np.ndarray | None = None
        self.copies, self.products, self.stores = Groups(), Groups(), Groups()
        self.has_to_wait = False  # for another group
        number = (thread + shared.group * num_threads).astype(np.uint32)
        self.special = {**program.special, "%tid.x": number}

    def each(self, value: Any) -> np.ndarray:
        """A register's value for every thread."""
        return np.broadcast_to(value, (self.num_threads,))

    def addresses(self, value: Any) -> np.ndarray:
        return self.each(value).astype(np.int64)

    def active(self, guard: Any) -> np.ndarray:
        """Which threads execute an instruction with this guard, None: all."""
        on = np.ones(self.num_threads, bool) if guard is None else self.each(guard)
        return on if self.mask is None else on & self.mask

    def only_thread(self, guard: Any, what: str) -> int | None:
        """The active one; None if no thread is."""
        threads = np.nonzero(self.active(guard))[0]
        if len(threads) > 1:
            raise Fault(f"{what}: by {len(threads)} threads")
        return int(threads[0]) if len(threads) else None

    def time(self) -> np.uint64:
        """A clock in nanoseconds that runs on whenever it is read."""
        self.program.nanoseconds += 500
        return np.uint64(self.program.nanoseconds)

    def meet(self, number: int, num_threads: int | None) -> Iterator[None]:
        """The barrier of this number, of so many threads or all. Yields while others have to go on first."""
        expected = num_threads or self.program.num_threads
        waiting = self.program.meetings.setdefault(number, [])
        waiting.append(self)
        arrived = sum(block.num_threads for block in waiting)
        if arrived > expected:
            raise Fault(f"bar.sync: {arrived} threads at a barrier of {expected}")
        if arrived == expected:
            self.shared.meet([block.shared.group for block in waiting])
            del self.program.meetings[number]
            self.program.num_events += 1
        while self.program.meetings.get(number) is waiting:
            yield

    def set_registers(self, direction: str, count: int) -> Iterator[None]:
        """setmaxnreg: gives registers back to the program, or yields while it has too few."""
        if (count < self.max_registers) if direction == "inc" else (count > self.max_registers):
            raise Fault(f"setmaxnreg.{direction}: from {self.max_registers} registers to {count}")
        more = (count - self.max_registers) * self.num_threads
        while more > self.program.free_registers:
            yield
        self.program.free_registers -= more
        self.max_registers = count
        self.program.num_events += 1

    def choose_parameter(self, number: np.ndarray, dtype: type) -> np.ndarray:
        limit = 2 ** (8 * np.dtype(dtype).itemsize)
        return np.array([self.parameters[int(n)] % limit for n in self.each(number)], dtype)

    # Loads and stores: of `length` elements of `width` bytes, by each active thread

    def load_global(self, address: Any, width: int, length: int, guard: Any) -> list[np.ndarray]:
        """An array for each element, zeros for threads that are not active."""
        on, size = self.active(guard), width * length
        addresses = self.addresses(address)[on]
        self.memory.require(addresses, size, size, "ld.global")
        found = np.zeros((self.num_threads, size), np.uint8)
        found[on] = self.memory.bytes[self.memory.index(addresses, size)]
        return list(found.view(UNSIGNED[width]).T)

    def store_global(self, address: Any, width: int, values: list[Any], guard: Any) -> None:
        on, size = self.active(guard), width * len(values)
        addresses = self.addresses(address)[on]
        self.memory.require(addresses, size, size, "st.global")
        data = self.elements(width, values)[on]
        _, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if (data[first][inverse] != data).any():
            raise Fault("st.global: threads write different values in one place")
        self.memory.bytes[self.memory.index(addresses, size)] = data

    def load_shared(self, address: Any, width: int, length: int, guard: Any) -> list[np.ndarray]:
        on, size = self.active(guard), width * length
        addresses = self.addresses(address)[on]
        self.shared.require(addresses, size, "ld.shared")
        found = np.zeros((self.num_threads, size), np.uint8)
        found[on] = self.shared.read(bytes_at(addresses, size), self.warp[on][:, None], "ld.shared")
        return list(found.view(UNSIGNED[width]).T)

    def store_shared(self, address: Any, width: int, values: list[Any], guard: Any) -> None:
        on, size = self.active(guard), width * len(values)
        addresses = self.addresses(address)[on]
        self.shared.require(addresses, size, "st.shared")
        data = self.elements(width, values)[on]
        self.shared.write(bytes_at(addresses, size), self.warp[on][:, None], data, "st.shared")

    def elements(self, width: int, values: list[Any]) -> np.ndarray:
        """(threads, bytes) of registers side by side."""
        columns = [self.each(value).astype(UNSIGNED[width]) for value in values]
        return np.stack(columns, 1).view(np.uint8)

    def copy_async(self, target: Any, source: Any, size: int, source_size: Any, guard: Any) -> None:
        """cp.async of `size` bytes: all of them, or zeros if `source_size` is 0."""
        on = self.active(guard)
        targets, warps = self.addresses(target)[on], self.warp[on][:, None]
        self.shared.require(targets, size, "cp.async")
        sizes = self.addresses(source_size)[on]
        copied = sizes > 0
        if (sizes[copied] != size).any():
            raise Fault("cp.async: copies a part and fills the rest with zeros")
        sources = self.addresses(source)[on][copied]
        self.memory.require(sources, size, size, "cp.async")
        data = np.zeros((len(targets), size), np.uint8)
        data[copied] = self.memory.bytes[self.memory.index(sources, size)]
        places = bytes_at(targets, size)
        self.shared.expect(places, warps, "cp.async")

        def finish() -> None:
            self.shared.write(places, warps, data, "cp.async")
            self.shared.is_fenced[places] = True  # neither Triton nor CUTLASS has a fence before wgmma here

        self.copies.open.append(finish)

    def reduce_max(self, value: np.ndarray) -> np.ndarray:
        """redux.sync.max.f32 of all lanes of a warp."""
        most = np.fmax.reduce(self.each(value).reshape(-1, WARP), axis=1)
        return np.repeat(most, WARP).view(np.uint32)

    def shuffle(self, mode: str, value: Any, other: Any) -> np.ndarray:
        """shfl.sync among all lanes of a warp."""
        other = self.addresses(other)
        source = {"bfly": self.lane ^ other, "idx": other % WARP}[mode]
        return self.each(value)[WARP * self.warp + source]
