from __future__ import annotations

import gc
import itertools
import math
import multiprocessing.util
import os
import pickle
import signal
import weakref
from pathlib import Path

import pytest
import torch
from image_files import noise

from vpt_fast.data.batches import Batches
from vpt_fast.data.decode import DecodeError, check_images, decode_image, default_workers
from vpt_fast.data.images import ImageList
from vpt_fast.data.preprocessing import Preprocessing
from vpt_fast.data.resident import device_budget, host_budget, resident_budget
from vpt_fast.data.splits import open_splits

NUM_IMAGES = 11
PREPROCESSINGS = {
    "squash": Preprocessing((6, 8)),
    "squash-flip": Preprocessing((6, 8), augment="flip"),
    "shortest": Preprocessing((8, 8), resize="shortest"),
    "shortest-flip": Preprocessing((8, 8), resize="shortest", augment="flip"),
    "crop-flip": Preprocessing((8, 8), resize="shortest", augment="crop_flip"),
}
each_preprocessing = pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageList:
    """Images of several shapes, in three classes."""
    root = tmp_path_factory.mktemp("images")
    paths = [root / f"{i}.png" for i in range(NUM_IMAGES)]
    for i, path in enumerate(paths):
        noise(9 + i % 3, 14 - i % 5, seed=i).save(path)
    return ImageList(tuple(paths), tuple(i % 3 for i in range(NUM_IMAGES)), ("a", "b", "c"))


def make(images, preprocessing=PREPROCESSINGS["squash"], batch_size=4, **options) -> Batches:
    return Batches(
        images,
        preprocessing,
        batch_size,
        **{"train": True, "seed": 0, "device": "cpu", "workers": 0, **options},
    )


def assert_same(some, others) -> None:
    for (pixels, labels), (other_pixels, other_labels) in zip(some, others, strict=True):
        assert torch.equal(pixels, other_pixels)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@each_preprocessing
def test_resident_and_decoded_batches_are_the_same(images, preprocessing, train):
    resident = make(images, preprocessing, train=train, resident="device")
    decoded = make(images, preprocessing, train=train, resident="off")
    assert (resident.is_resident, decoded.is_resident) == (True, False)

    for epoch in range(3):
        assert_same(resident.epoch(epoch), decoded.epoch(epoch))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(images, workers):
    one = make(images, PREPROCESSINGS["crop-flip"], resident="off")
    more = make(images, PREPROCESSINGS["crop-flip"], resident="off", workers=workers)
    for epoch in range(2):
        assert_same(one.epoch(epoch), more.epoch(epoch))


def test_workers_give_the_same_batches_without_room_in_shared_memory(images, full_shared_memory):
    batches = make(images, resident="off", workers=1)
    assert_same(make(images, resident="off").epoch(0), batches.epoch(0))
    assert len(full_shared_memory) == len(batches)


def test_evaluation_goes_through_the_list_in_order_as_the_model_sees_it(images):
    preprocessing = PREPROCESSINGS["crop-flip"]
    pixels, labels = zip(*make(images, preprocessing, train=False).epoch(0), strict=True)
    expected = torch.stack([preprocessing(decode_image(path)) for path in images.items])
    assert torch.equal(torch.cat(pixels), expected)
    assert tuple(torch.cat(labels).tolist()) == images.labels


def test_training_covers_every_image_once_with_its_label(images):
    batches = make(images)
    expected = torch.stack([batches.preprocessing(decode_image(path)) for path in images.items])
    order = batches.indices(5)
    assert sorted(order.tolist()) == list(range(NUM_IMAGES))
    pixels, labels = zip(*batches.epoch(5), strict=True)
    assert torch.equal(torch.cat(pixels), expected[order])
    assert torch.equal(torch.cat(labels), torch.tensor(images.labels)[order])


def test_batches_are_float32_and_int64_and_the_last_is_short(images):
    batches = list(make(images).epoch(0))
    assert [(tuple(x.shape), x.dtype, y.dtype) for x, y in batches] == [
        ((size, 3, 6, 8), torch.float32, torch.int64) for size in (4, 4, 3)
    ]


@pytest.mark.parametrize("batch_size, steps", [(1, 11), (4, 3), (11, 1), (100, 1)])
def test_length_is_the_number_of_steps(images, batch_size, steps):
    batches = make(images, batch_size=batch_size)
    assert len(batches) == len(list(batches.epoch(0))) == steps


@each_preprocessing
def test_same_seed_and_epoch_give_the_same_batches(images, preprocessing):
    assert_same(make(images, preprocessing, seed=7).epoch(3), make(images, preprocessing, seed=7).epoch(3))


def test_an_epoch_does_not_depend_on_those_before(images):
    batches = make(images, PREPROCESSINGS["crop-flip"])
    for epoch in range(3):
        next(iter(batches.epoch(epoch)))
    assert_same(batches.epoch(3), make(images, PREPROCESSINGS["crop-flip"]).epoch(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_half_way_does_not_disturb_the_next(images, workers):
    batches = make(images, batch_size=2, resident="off", workers=workers)
    next(iter(batches.epoch(0)))
    assert_same(batches.epoch(1), make(images, batch_size=2).epoch(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_at_once_are_refused(images, workers):
    batches = make(images, batch_size=1, resident="off", workers=workers)
    with pytest.raises(RuntimeError, match="epoch: another epoch was started"):
        list(zip(batches.epoch(0), batches.epoch(1), strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_leave_the_workers_to_the_process_that_trains(images, number):
    batches = make(images, batch_size=1, resident="off", workers=2)
    epoch = batches.epoch(0)
    next(epoch), next(epoch)  # one from each worker: both are at work
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, number)
    assert len(list(epoch)) == NUM_IMAGES - 2


def test_workers_of_a_process_that_exits_within_an_epoch_end(images):
    others = multiprocessing.active_children()
    epoch = make(images, batch_size=1, resident="off", workers=1).epoch(0)
    next(epoch)
    (worker,) = {*multiprocessing.active_children()} - {*others}
    multiprocessing.util._run_finalizers(0)  # so begins the end of a process; then it ends its workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_orders_differ_between_epochs_and_seeds(images):
    of_seeds = [make(images, seed=seed, resident="off") for seed in range(10)]
    orders = {tuple(batches.indices(epoch).tolist()) for batches in of_seeds for epoch in range(10)}
    assert len(orders) == 100


def test_every_image_is_mirrored_in_half_of_the_epochs(images):
    batches = make(images, PREPROCESSINGS["squash-flip"], batch_size=NUM_IMAGES)
    plain = torch.stack([batches.preprocessing(decode_image(path)) for path in images.items])
    mirrored = torch.zeros(NUM_IMAGES)
    for epoch in range(100):
        order, (pixels, _) = batches.indices(epoch), next(iter(batches.epoch(epoch)))
        for i, image in zip(order.tolist(), pixels, strict=True):
            assert torch.equal(image, plain[i]) or torch.equal(image, plain[i].flip(-1))
            mirrored[i] += torch.equal(image, plain[i].flip(-1))
    # 100 throws of a coin: 5 standard deviations
    assert mirrored.min() >= 25 and mirrored.max() <= 75


def test_crops_move_between_epochs_within_the_resized_image(images):
    preprocessing = PREPROCESSINGS["crop-flip"]
    resized = preprocessing.resize_image(decode_image(images.items[0]))
    places = [
        preprocessing.normalize(crop)
        for top in range(resized.shape[1] - 7)
        for left in range(resized.shape[2] - 7)
        for crop in (
            resized[:, top : top + 8, left : left + 8],
            resized[:, top : top + 8, left : left + 8].flip(-1),
        )
    ]
    batches = make(images.select([0]), preprocessing)
    seen = set()
    for epoch in range(300):
        image = next(iter(batches.epoch(epoch)))[0][0]
        matches = [i for i, place in enumerate(places) if torch.equal(image, place)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == len(places) > 2


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("resident", ["device", "off"])
def test_ranks_together_take_the_batches_of_one_process(images, world_size, resident):
    preprocessing = PREPROCESSINGS["crop-flip"]
    alone = list(make(images, preprocessing, batch_size=2 * world_size).epoch(1))
    ranks = [
        list(make(images, preprocessing, 2, rank=r, world_size=world_size, resident=resident).epoch(1))
        for r in range(world_size)
    ]
    for step in range(NUM_IMAGES // (2 * world_size)):
        together = torch.stack([rank[step][0] for rank in ranks], dim=1).flatten(0, 1)
        assert torch.equal(together, alone[step][0])


@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_ranks_train_the_same_number_of_steps_and_cover_every_image(images, world_size):
    ranks = [make(images, batch_size=2, rank=r, world_size=world_size) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {math.ceil(math.ceil(NUM_IMAGES / world_size) / 2)}
    counts = torch.bincount(torch.cat([rank.indices(0) for rank in ranks]), minlength=NUM_IMAGES)
    padded = math.ceil(NUM_IMAGES / world_size) * world_size
    assert counts.min() >= 1 and counts.max() <= math.ceil(padded / NUM_IMAGES) and counts.sum() == padded


@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_ranks_evaluate_every_image_exactly_once(images, world_size):
    ranks = [make(images, train=False, rank=r, world_size=world_size) for r in range(world_size)]
    seen = torch.cat([rank.indices(0) for rank in ranks])
    assert sorted(seen.tolist()) == list(range(NUM_IMAGES))
    labels = [labels for rank in ranks for _, labels in rank.epoch(0)]
    assert torch.equal(torch.cat(labels), torch.tensor(images.labels)[seen])
    assert {rank.num_images for rank in ranks} == {NUM_IMAGES}
    assert [rank.num_rank_images for rank in ranks] == [len(rank.indices(0)) for rank in ranks]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("resident", ["device", "off"])
def test_global_generator_is_left_alone(images, resident, workers):
    batches = make(images, PREPROCESSINGS["crop-flip"], resident=resident, workers=workers)
    before = torch.get_rng_state()
    list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_results_do_not_depend_on_the_global_generator(images):
    torch.manual_seed(1)
    first = list(make(images, PREPROCESSINGS["crop-flip"]).epoch(0))
    torch.manual_seed(2)
    assert_same(first, make(images, PREPROCESSINGS["crop-flip"]).epoch(0))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@each_preprocessing
def test_checked_images_bring_their_pixels(images, preprocessing, train, monkeypatch):
    checked = check_images(images, preprocessing=preprocessing, keep_bytes=1 << 20)
    expected = list(make(images, preprocessing, train=train).epoch(0))
    monkeypatch.setattr("PIL.Image.open", None)  # nothing is decoded again
    assert_same(make(checked, preprocessing, train=train).epoch(0), expected)


@pytest.mark.parametrize(
    "made_for, wanted",
    [
        (Preprocessing((8, 8)), Preprocessing((6, 8))),
        (Preprocessing((8, 8)), Preprocessing((8, 8), interpolation="bilinear")),
        (Preprocessing((8, 8)), Preprocessing((8, 8), resize="shortest")),
        (Preprocessing((8, 8), resize="shortest"), Preprocessing((8, 8), resize="shortest", crop_pct=0.5)),
        (Preprocessing((8, 8), resize="shortest"), PREPROCESSINGS["crop-flip"]),
    ],
    ids=["size", "interpolation", "resize", "crop_pct", "crop"],
)
def test_pixels_made_for_another_preprocessing_are_refused(images, made_for, wanted):
    checked = check_images(images, preprocessing=made_for, keep_bytes=1 << 20)
    with pytest.raises(ValueError, match="preprocessing: .*but the images were resized for"):
        make(checked, wanted)


@pytest.mark.parametrize("name", ["squash", "crop-flip"])
def test_auto_is_resident_up_to_the_budget(images, name, monkeypatch):
    preprocessing = PREPROCESSINGS[name]
    num_bytes = check_images(images, preprocessing=preprocessing, keep_bytes=1 << 20).resident.num_bytes
    monkeypatch.setattr("vpt_fast.data.resident.host_budget", lambda: num_bytes)
    assert make(images, preprocessing).is_resident
    monkeypatch.setattr("vpt_fast.data.resident.host_budget", lambda: num_bytes - 1)
    assert not make(images, preprocessing).is_resident


@pytest.mark.parametrize(
    "resident, device_bytes, host_bytes, kept_on",
    [
        ("auto", 1, 1, "meta"),
        ("auto", 0, 1, "cpu"),
        ("auto", 0, 0, None),
        ("host", 1, 0, "cpu"),
        ("device", 0, 0, "meta"),
        ("off", 1, 1, None),
    ],
)
def test_pixels_are_kept_where_they_fit_or_where_they_are_asked_to(
    images, monkeypatch, resident, device_bytes, host_bytes, kept_on
):
    # "meta" stands for a GPU: another device than the one that decodes.
    num_bytes = check_images(
        images, preprocessing=PREPROCESSINGS["squash"], keep_bytes=1 << 20
    ).resident.num_bytes
    for name, share in (("device_budget", device_bytes), ("host_budget", host_bytes)):
        monkeypatch.setattr(f"vpt_fast.data.resident.{name}", lambda *device, share=share: share * num_bytes)
    monkeypatch.setattr("vpt_fast.data.batches.device_budget", lambda device: device_bytes * num_bytes)
    batches = make(images, device="meta", resident=resident)
    assert (batches.resident_device and batches.resident_device.type) == kept_on


def test_images_copied_one_by_one_from_pinned_memory_are_the_same(images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    gathered, copied = (make(images, PREPROCESSINGS["squash-flip"], resident="host") for _ in range(2))
    copied._is_pinned = True  # as where there is a GPU
    assert_same(copied.epoch(1), gathered.epoch(1))


@pytest.mark.parametrize("steps", [1, None], ids=["ended early", "whole"])
def test_epoch_ends_when_all_copies_from_pinned_memory_are_done(images, monkeypatch, steps):
    """The memory may be let go then."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    batches = make(images, resident="host")
    batches._is_pinned = True
    epoch = batches.epoch(0)
    for _ in itertools.islice(epoch, steps):
        assert not waited
    epoch.close()
    assert waited == [batches.device]


@pytest.mark.parametrize("resident", ["host", "off"])
def test_only_a_cuda_device_reads_pixels_after_the_copy_was_asked_for(images, overlapping, resident):
    """On Apple's MPS it would read freed memory. The device "meta" stands for all others."""
    ((pixels, _),) = make(images, batch_size=NUM_IMAGES, device="meta", resident=resident).epoch(0)
    assert pixels.device.type == "meta" and overlapping == []


class Cudart:
    """CUDA's runtime, as far as memory is pinned with it: addresses that are, and what it answers."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.pinned = status, {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.pinned |= {address: num_bytes} if self.status == 0 else {}
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"


def test_pixels_are_pinned_where_they_lie_as_long_as_they_live(images, monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    resident = check_images(images, preprocessing=PREPROCESSINGS["squash"], keep_bytes=1 << 20).resident
    assert resident.pin() is None
    assert cudart.pinned == {resident.pixels.data_ptr(): resident.num_bytes}
    del resident
    assert cudart.pinned == {}


@pytest.mark.parametrize("name, reason", [("squash", "error 2"), ("crop-flip", "their sizes differ")])
def test_pixels_that_cannot_be_pinned_come_with_the_reason(images, monkeypatch, name, reason):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(status=2))
    resident = check_images(images, preprocessing=PREPROCESSINGS[name], keep_bytes=1 << 20).resident
    assert reason in resident.pin()


def test_host_budget_is_a_quarter_of_free_memory_shared_by_local_processes(monkeypatch):
    monkeypatch.setattr("vpt_fast.data.resident.free_bytes", lambda device: 4000 << 10)
    assert host_budget() == 1000 << 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host_budget() == 250 << 10


def test_budgets_where_free_memory_is_unknown_are_small(monkeypatch):
    monkeypatch.setattr("vpt_fast.data.resident.free_bytes", lambda device: None)
    assert host_budget() == device_budget("cpu") == 2 << 30


@pytest.mark.parametrize(
    "device_free, processes, budget",
    [(1200, 1, 300), (8000, 1, 500), (80, 1, 250), (8000, 4, 125)],
    ids=["device", "half of the host", "quarter of the host", "processes"],
)
def test_pixels_for_a_gpu_take_no_more_of_the_host_than_it_can_stage(
    monkeypatch, device_free, processes, budget
):
    free = {"cuda": device_free, "cpu": 1000}
    monkeypatch.setattr("vpt_fast.data.resident.free_bytes", lambda device: free[device.type])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert resident_budget("cuda") == budget


def test_pixels_that_were_staged_go_to_the_device_whatever_is_left_of_the_host(images, monkeypatch):
    checked = check_images(images, preprocessing=PREPROCESSINGS["squash"], keep_bytes=1 << 20)
    monkeypatch.setattr("vpt_fast.data.resident.free_bytes", lambda device: 0)
    monkeypatch.setattr("vpt_fast.data.batches.device_budget", lambda device: checked.resident.num_bytes)
    assert make(checked, device="meta").resident_device.type == "meta"


def test_all_cores_decode_shared_by_local_processes(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr("vpt_fast.control_groups.cores", lambda: None)
    assert default_workers() == 6
    monkeypatch.setattr("vpt_fast.control_groups.cores", lambda: 4)
    assert default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 1


def test_evaluation_keeps_no_more_than_the_crop(images):
    batches = make(images, PREPROCESSINGS["crop-flip"], train=False)
    assert batches.resident_bytes == NUM_IMAGES * 3 * 8 * 8


@pytest.mark.parametrize("left, is_kept", [(3, True), (1, True), (0.99, False)])
def test_pixels_that_were_within_the_budget_are_let_go_only_if_they_take_more_than_is_left(
    images, monkeypatch, left, is_kept
):
    """Of four times their size, they leave three; a model and other images take more."""
    num_bytes = NUM_IMAGES * 3 * 6 * 8
    free = 4 * num_bytes
    monkeypatch.setattr("vpt_fast.data.resident.free_bytes", lambda device: free)
    keep_bytes = resident_budget("cpu")
    checked = check_images(images, preprocessing=PREPROCESSINGS["squash"], keep_bytes=keep_bytes)
    assert checked.resident is not None
    free = int(left * num_bytes)
    assert make(checked).is_resident == is_kept


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resident", ["device", "off"])
def test_broken_file_is_named(images, tmp_path, resident, workers):
    (tmp_path / "broken.png").write_bytes(b"broken")
    with_broken = ImageList((*images.items, tmp_path / "broken.png"), (*images.labels, 0), images.classes)
    with pytest.raises(DecodeError, match=r"broken\.png: not an image in a format that Pillow decodes$"):
        list(make(with_broken, resident=resident, workers=workers).epoch(0))


def test_workers_share_the_names_of_files(tmp_path):
    class Watched(type(Path())):
        pass

    paths = [Watched(tmp_path / name) for name in ("a.png", "caf\udce9 🍎.png", "b/ö.png", "c.png")]
    (tmp_path / "b").mkdir()
    for i, path in enumerate(paths):
        noise(8, 6, seed=i).save(path)
    expected = torch.stack([PREPROCESSINGS["squash"](decode_image(path)) for path in paths])
    batches = make(ImageList(tuple(paths), (0, 1, 0, 1), ("a", "b")), train=False, resident="off")
    alive = [weakref.ref(path) for path in paths]
    del paths, path
    gc.collect()
    assert not any(
        each() for each in alive
    )  # an object's count of references is written by each that reads it
    ((pixels, _),) = batches.epoch(0)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("method", "started"), [("forkserver", "fork"), ("fork", "fork"), ("spawn", "spawn")]
)
def test_workers_are_forked_unless_they_are_to_be_spawned(images, method, started):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = make(images, resident="off", workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert batches._loader._loader.multiprocessing_context.get_start_method() == started
    assert_same(batches.epoch(0), make(images, resident="off").epoch(0))


def test_decode_error_crosses_processes():
    error = pickle.loads(pickle.dumps(DecodeError("folder/x.png", "truncated")))
    assert (str(error.path), error.reason, str(error)) == (
        "folder/x.png",
        "truncated",
        "folder/x.png: truncated",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size: 0, wanted 1 or more"),
        ({"seed": -1}, "seed: -1, wanted 0 or more"),
        ({"workers": -1}, "workers: -1, wanted 0 or more"),
        ({"world_size": 0}, "world_size: 0, wanted 1 or more"),
        ({"rank": 2, "world_size": 2}, "rank: 2, wanted 0 to world_size - 1 = 1"),
        ({"resident": "yes"}, "resident: 'yes', wanted one of auto, device, host, off"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_that_cannot_be_used_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        make(images, **options)


def test_empty_list_is_refused(images):
    with pytest.raises(ValueError, match="images: 0, wanted 1 or more"):
        make(images.select([]))


def test_negative_epoch_is_refused(images):
    with pytest.raises(ValueError, match="epoch: -1"):
        make(images).epoch(-1)


def test_one_image_of_each_class_is_enough(write_images):
    splits = open_splits(write_images({"a": 2, "b": 2}))
    assert [len(x) for x, _ in make(splits.train, batch_size=64).epoch(0)] == [2]


@pytest.mark.parametrize("resident", ["device", "off"])
@each_preprocessing
def test_images_are_contiguous(images, preprocessing, resident):
    batches = make(images, preprocessing, resident=resident)
    assert all(pixels.is_contiguous() for pixels, _ in batches.epoch(0))
