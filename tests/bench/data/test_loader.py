"""Batches: a function of seed and step alone; errors in workers arrive as they are."""

import errno
import multiprocessing
import os
import random
import signal
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data import loader
from bench.data.coco import CocoDataset
from bench.data.images import NetworkSize, resize, to_float
from bench.errors import InputError
from bench.model.detectors import resize_target
from tests import coco
from tests.coco import assert_same

COUNT = 7


def write(root: Path, *, crowd_only: tuple[int, ...] = (5,), empty: tuple[int, ...] = (6,)) -> None:
    """Images 1 to 7, odd ones portrait; each has an instance and a crowd unless said otherwise."""
    sizes = {n: (40, 20 + n) if n % 2 else (20 + n, 40) for n in range(1, COUNT + 1)}
    annotations: list[dict[str, Any]] = []
    for image_id in sizes:
        for crowd in (0, 1):
            if image_id in empty or (image_id in crowd_only and not crowd):
                continue
            number, box = len(annotations) + 1, [2, 3, 6 + image_id, 5]
            annotations.append(coco.annotation(number, image_id, 1, box, iscrowd=crowd))
    coco.write(root, coco.content({1: "thing"}, sizes, annotations), noise)


def noise(image: dict[str, Any]) -> np.ndarray:
    shape = (image["height"], image["width"], 3)
    return np.random.default_rng(image["id"]).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    root = tmp_path_factory.mktemp("loader") / "coco"
    write(root)
    return CocoDataset(root, "train2017")


def batches(data: CocoDataset, **options: Any) -> list[loader.Batch]:
    return list(loader.training_batches(data, **{"batch_size": 2, "seed": 0, "steps": 8} | options))


def ids(found: list[loader.Batch]) -> list[list[int]]:
    return [[int(target["image_id"]) for target in targets] for _, targets in found]


@settings(max_examples=25)
@given(
    start=st.integers(0, 12),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    grouped=st.booleans(),
)
def test_resuming_gives_the_batches_of_an_undisturbed_run(
    data: CocoDataset, start: int, batch_size: int, seed: int, grouped: bool
) -> None:
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "steps": 12,
        "aspect_ratio_grouping": grouped,
    }
    whole = batches(data, **options)
    assert len(whole) == 12
    assert all(len(images) == len(targets) == batch_size for images, targets in whole)
    assert_same(batches(data, **options, start_step=start), whole[start:])


def test_a_longer_run_begins_like_a_shorter_one(data: CocoDataset) -> None:
    assert_same(batches(data, steps=20)[:8], batches(data, steps=8))
    assert batches(data, steps=8, start_step=8) == []


def test_workers_change_nothing(data: CocoDataset) -> None:
    assert_same(batches(data, num_workers=2), batches(data))
    assert_same(batches(data, num_workers=2, start_step=3), batches(data)[3:])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_usable_image_comes_once_an_epoch(data: CocoDataset, batch_size: int) -> None:
    found = ids(batches(data, batch_size=batch_size, steps=30 // batch_size))
    order = [image_id for batch in found for image_id in batch]
    epochs = [order[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 7] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_gives_another_order(data: CocoDataset) -> None:
    orders = {str(ids(batches(data, seed=seed))) for seed in range(4)}
    assert len(orders) == 4


def test_crowds_are_left_out_of_training(data: CocoDataset) -> None:
    for _, targets in batches(data):
        for target in targets:
            assert target["iscrowd"].tolist() == [0]
            assert len(target["boxes"]) == len(target["masks"]) == len(target["area"]) == 1


def test_flips_mirror_image_box_and_mask_together(data: CocoDataset) -> None:
    flips = 0
    for images, targets in batches(data, steps=200):
        for image, target in zip(images, targets, strict=True):
            index = data.ids.index(int(target["image_id"]))
            plain, plain_target = data[index]
            rows, columns = torch.nonzero(target["masks"][0], as_tuple=True)
            x1, y1, x2, y2 = target["boxes"][0].tolist()
            assert (columns.min(), rows.min()) == (x1, y1)
            assert (columns.max() + 1, rows.max() + 1) == (x2, y2)
            if torch.equal(image, plain):
                assert torch.equal(target["boxes"], plain_target["boxes"][:1])
                continue
            assert torch.equal(image, plain.flip(-1))
            flips += 1
    # Of 400, half: five standard deviations.
    assert 150 <= flips <= 250


def test_flips_of_an_image_differ_between_epochs(data: CocoDataset) -> None:
    seen: dict[int, set[float]] = {}
    for _, targets in batches(data, steps=30):
        for target in targets:
            seen.setdefault(int(target["image_id"]), set()).add(float(target["boxes"][0, 0]))
    assert all(len(lefts) == 2 for lefts in seen.values())


def test_flips_can_be_turned_off(data: CocoDataset) -> None:
    for images, targets in batches(data, flip=False):
        for image, target in zip(images, targets, strict=True):
            assert torch.equal(image, data[data.ids.index(int(target["image_id"]))][0])


def test_grouping_does_not_mix_orientations(data: CocoDataset) -> None:
    options: dict[str, Any] = {"batch_size": 3, "steps": 20}
    found = batches(data, aspect_ratio_grouping=True, **options)
    wide = [{image.shape[-1] >= image.shape[-2] for image in images} for images, _ in found]
    assert all(len(kinds) == 1 for kinds in wide)
    assert {True, False} == set.union(*wide)
    # Nothing is lost to the grouping: all images come equally often, but for what waits.
    counts = Counter(image_id for batch in ids(found) for image_id in batch)
    assert set(counts) == {1, 2, 3, 4, 7}
    assert max(counts.values()) - min(counts.values()) <= 2
    mixed = batches(data, **options)
    assert any(len({image.shape[-1] >= image.shape[-2] for image in b}) == 2 for b, _ in mixed)


def test_grouping_works_where_all_images_are_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path / "coco", empty=(2, 4, 6))
    data = CocoDataset(tmp_path / "coco", "train2017")
    found = ids(batches(data, aspect_ratio_grouping=True))
    assert {image_id for batch in found for image_id in batch} == {1, 3, 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_of_the_caller_are_untouched(data: CocoDataset, workers: int) -> None:
    states = torch.get_rng_state(), random.getstate()
    for _ in loader.training_batches(
        data, batch_size=2, seed=0, steps=4, num_workers=workers, aspect_ratio_grouping=True
    ):
        assert torch.equal(torch.get_rng_state(), states[0])
    list(loader.evaluation_batches(data, batch_size=2, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_the_caller_s_random_state_changes_nothing(data: CocoDataset) -> None:
    torch.manual_seed(1)
    first = batches(data)
    torch.manual_seed(2)
    assert_same(first, batches(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_it_is(tmp_path: Path, workers: int) -> None:
    write(tmp_path / "coco")
    data = CocoDataset(tmp_path / "coco", "train2017")
    (tmp_path / "coco" / "train2017" / "3.png").write_bytes(b"no image")
    for found in (
        loader.training_batches(data, batch_size=2, seed=0, steps=9, num_workers=workers),
        loader.evaluation_batches(data, batch_size=2, num_workers=workers),
    ):
        with pytest.raises(InputError, match=r"3\.png") as caught:
            list(found)
        assert type(caught.value) is InputError
        assert str(caught.value).startswith("cannot read image ")
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files under /proc")
def test_batches_of_workers_hold_no_open_files(data: CocoDataset) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [
        (batch, len(list(Path("/proc/self/fd").iterdir())))
        for batch in loader.training_batches(data, batch_size=8, seed=0, steps=6, num_workers=1)
    ]
    assert held[-1][1] - before < 40
    assert_same([batch for batch, _ in held], batches(data, batch_size=8, steps=6))


def test_a_run_may_stop_early(data: CocoDataset) -> None:
    found = loader.training_batches(data, batch_size=2, seed=0, steps=100, num_workers=1)
    first = next(found)
    found.close()
    assert_same([first], batches(data, steps=1))


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_parts_of_the_processes_are_the_batch_of_one(
    data: CocoDataset, world_size: int, grouped: bool
) -> None:
    options: dict[str, Any] = {
        "batch_size": 2 * world_size,
        "aspect_ratio_grouping": grouped,
        "start_step": 2,
    }
    parts = [batches(data, **options, rank=n, world_size=world_size) for n in range(world_size)]
    joined = [
        (
            [image for images, _ in step for image in images],
            [target for _, targets in step for target in targets],
        )
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, batches(data, **options))


def test_a_batch_that_the_processes_cannot_share_is_refused(data: CocoDataset) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 5; a multiple of the 2 processes"):
        batches(data, batch_size=5, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_gives_each_image_to_one_process(data: CocoDataset, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        found = ids(
            list(loader.evaluation_batches(data, batch_size=2, rank=rank, world_size=world_size))
        )
        assert all(len(batch) <= 2 for batch in found)
        seen += [image_id for batch in found for image_id in batch]
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]


def test_only_images_of_one_padded_size_share_a_batch_of_evaluation(data: CocoDataset) -> None:
    def canvas(height: int, width: int) -> tuple[int, int]:
        return height // 32, width // 32

    found = list(loader.evaluation_batches(data, batch_size=3, canvas=canvas))
    sizes = [{canvas(*image.shape[-2:]) for image in images} for images, _ in found]
    assert all(len(shapes) == 1 for shapes in sizes)
    assert len({*map(frozenset, sizes)}) > 1
    assert sorted(id_ for batch in ids(found) for id_ in batch) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_holds_no_more_than_what_is_near(data: CocoDataset, workers: int) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for images, _ in loader.evaluation_batches(data, batch_size=1, num_workers=workers):
        alive += (weakref.ref(image) for image in images)
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == COUNT
    # The batch in hand, and the one before while its place in the loop is not yet taken.
    assert most <= 2


def until_killed(found: Iterator[loader.Batch], busy: float) -> None:
    """Read batches, kill a worker at the fourth, and be busy for some seconds then."""
    # Workers of a test before this one may still be ending.
    others = {child.pid for child in multiprocessing.active_children()}
    for step, _ in enumerate(found):
        if step == 3:
            own = {child.pid for child in multiprocessing.active_children()} - others
            os.kill(own.pop() or 0, signal.SIGKILL)
            time.sleep(busy)


@pytest.mark.parametrize("busy", [0.0, 0.3])
def test_a_killed_worker_is_one_clear_error(data: CocoDataset, busy: float) -> None:
    """Whether PyTorch notices while the caller is at work or while it waits for the next batch."""
    found = loader.training_batches(data, batch_size=2, seed=0, steps=10_000, num_workers=2)
    with pytest.raises(loader.DataWorkerError) as caught, loader.clear_worker_errors():
        until_killed(found, busy)
    assert "killed" in str(caught.value)
    assert "fewer data.workers" in str(caught.value)
    assert "\n" not in str(caught.value)
    found.close()


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), loader.clear_worker_errors():
        raise RuntimeError("something else")


def test_ctrl_c_does_not_reach_the_workers(data: CocoDataset) -> None:
    """A terminal sends it to every process; the main one needs its workers until it is done."""
    found = loader.training_batches(data, batch_size=2, seed=0, steps=40, num_workers=1)
    first = next(found)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)
    assert_same([first, *found], batches(data, steps=40))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_time_to_read_is_added_up_whether_or_not_it_is_waited_for(
    data: CocoDataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    read = CocoDataset.read

    def slow(dataset: CocoDataset, index: int, **options: Any) -> loader.Sample:
        time.sleep(0.05)
        return read(dataset, index, **options)

    monkeypatch.setattr(CocoDataset, "read", slow)
    pace = loader.Pace()
    found = loader.training_batches(
        data, batch_size=2, seed=0, steps=6, num_workers=workers, pace=pace
    )
    next(found)
    assert pace.waited >= 0.1
    pace.reset()
    for _ in range(4):
        # The caller is busy for longer than two workers are with a batch.
        time.sleep(0.1)
        next(found)
    whole = 4 * 2 * 0.05
    assert whole / max(1, workers) <= pace.reading < 2 * whole / max(1, workers)
    assert pace.waited >= whole if workers == 0 else pace.waited < pace.reading
    assert pace.reset().reading > 0
    assert pace == loader.Pace()


@pytest.mark.gpu
def test_batches_are_pinned_where_there_is_a_gpu(data: CocoDataset) -> None:
    images, targets = batches(data, steps=1, num_workers=1)[0]
    assert images[0].is_pinned()
    assert targets[0]["masks"].is_pinned()


def test_a_batch_of_nothing_is_refused(data: CocoDataset) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(data, batch_size=0)


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    write(tmp_path / "coco", crowd_only=(1, 2, 3), empty=(4, 5, 6, 7))
    data = CocoDataset(tmp_path / "coco", "train2017")
    with pytest.raises(InputError, match=r"instances_train2017\.json.*crowds"):
        batches(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_every_image_once_in_order(data: CocoDataset, workers: int) -> None:
    found = list(loader.evaluation_batches(data, batch_size=3, num_workers=workers))
    assert ids(found) == [[1, 2, 3], [4, 5, 6], [7]]
    targets = [target for _, batch in found for target in batch]
    assert [target["iscrowd"].tolist() for target in targets[3:6]] == [[0, 1], [1], []]
    assert torch.equal(found[0][0][0], data[0][0])


def many_objects(root: Path, *, side: int, objects: int = 60) -> CocoDataset:
    """One picture of `side` pixels with objects of a fortieth of it."""
    size, annotations = side / 40, []
    for number in range(objects):
        x, y = (number % 10 + 0.3) * 3 * size, (number // 10 + 0.4) * 3 * size
        annotations.append(coco.annotation(number + 1, 1, 1, [x, y, size, size]))
    coco.write(root, coco.content({1: "thing"}, {1: (side, 2 * side)}, annotations), noise)
    return CocoDataset(root, "train2017")


@pytest.mark.parametrize("side", [100, 150, 700])
def test_what_is_read_in_the_network_s_size_is_what_the_detector_makes(
    tmp_path: Path, side: int
) -> None:
    """Image, boxes and masks to the digit, flipped or not, whether resized here or there."""
    data = many_objects(tmp_path, side=side, objects=5)
    sizes = NetworkSize((96, 120), 300)
    options: dict[str, Any] = {"batch_size": 1, "seed": 3, "steps": 8}
    whole = loader.training_batches(data, **options)
    drawn = set()
    for (images, targets), (plain, plain_targets) in zip(
        loader.training_batches(data, network_size=sizes, **options), whole, strict=True
    ):
        (image,), (target,) = images, targets
        size = tuple(target["size"].tolist())
        drawn.add(size)
        expected = resize(to_float(plain[0]), size)
        wanted = resize_target(plain_targets[0], plain[0].shape[-2:], size)
        assert torch.equal(resize(to_float(image), size), expected)
        found = resize_target(target, image.shape[-2:], size)
        torch.testing.assert_close(found["boxes"], wanted["boxes"])
        assert torch.equal(found["masks"], wanted["masks"])
        # Nothing is handed over that has more bytes than it needs.
        most = max(4 * 3 * size[0] * size[1], 1)
        assert image.numel() * image.element_size() <= most or side < 200
        assert target["masks"][0].numel() <= min(size[0] * size[1], 2 * side * side)
    assert drawn == {(96, 192), (120, 240)}


def test_memory_of_a_step_does_not_grow_with_the_stored_size(tmp_path: Path) -> None:
    taken = []
    for side in (400, 1200):
        data = many_objects(tmp_path / str(side), side=side)
        sizes = NetworkSize((96,), 300)
        images, targets = next(
            loader.training_batches(data, batch_size=1, seed=0, steps=1, network_size=sizes)
        )
        tensors = [images[0], *targets[0].values()]
        taken.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert taken[0] == taken[1] < 2_000_000


def test_a_detector_without_masks_decodes_none(
    data: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask was decoded")

    monkeypatch.setattr("bench.data.masks.pixels", decoded)
    for _, targets in batches(data, masks=False):
        assert all("masks" not in target for target in targets)
    assert len(list(loader.evaluation_batches(data, batch_size=2))) == 4


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (2, 9999), (1, 1)])
def test_an_image_of_an_extreme_aspect_keeps_a_pixel(size: tuple[int, int]) -> None:
    assert min(NetworkSize((800,), 1333).of(*size)) >= 1


def test_no_room_in_shared_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path)
    monkeypatch.setattr(loader.DataLoader, "__iter__", full)
    batches = loader.training_batches(
        CocoDataset(tmp_path, "train2017"), batch_size=1, seed=0, steps=1
    )
    with pytest.raises(loader.DataWorkerError, match=r"No space left .*/dev/shm, and data.workers"):
        next(batches)
