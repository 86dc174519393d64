import itertools

import pytest
import torch

from bench.data.symbols import KEY_BITS, SIDE, TASKS, VALUES


def drawn(name, level, images=8):
    return TASKS[name].draw(level, images, torch.Generator().manual_seed(0), 1.0)


@pytest.mark.parametrize(
    ("name", "level"), [(n, v) for n in ("bind", "regions") for v in TASKS[n].levels]
)
def test_a_cell_that_asks_is_answered_by_a_cell_with_its_key(name, level):
    images = drawn(name, level)
    for cells, answers in zip(images.cells, images.answers, strict=True):
        keys, asks = cells[:, :KEY_BITS], answers >= 0
        shown = cells[:, KEY_BITS : KEY_BITS + VALUES]
        mark = cells[:, -1] == 1
        assert not (asks & ~mark).any()
        assert (shown[mark] == 0).all()
        same = (keys[asks] @ keys[~mark].T) == KEY_BITS
        assert same.any(dim=1).all()
        # Keys are drawn for each region, so that few of the many of small regions are the same.
        found = same.float() @ shown[~mark]
        right = found.argmax(dim=1) == answers[asks]
        assert right.float().mean() > (0.97 if level == 2 and name == "regions" else 0.999)
    assert 0.35 < (images.answers >= 0).float().mean() <= 0.5


def test_regions_have_bindings_of_their_own_at_a_random_shift():
    images = drawn("regions", 4)
    keys = images.cells[:, :, :KEY_BITS].unflatten(1, (SIDE, SIDE))
    borders = set()
    for image in keys:
        of_rows = [{tuple(key.tolist()) for key in row} for row in image]
        shared = [len(a & b) for a, b in itertools.pairwise(of_rows)]
        apart = [number for number, count in enumerate(shared, start=1) if count == 0]
        assert len({number % 4 for number in apart}) == 1
        borders |= {number % 4 for number in apart}
    assert len(borders) > 1


def test_bindup_shows_symbols_of_two_by_two_noisy_cells():
    images = drawn("bindup", 4)
    answers = images.answers.unflatten(1, (SIDE // 2, 2, SIDE // 2, 2))
    assert (answers == answers[:, :, :1, :, :1]).all()
    cells = images.cells.unflatten(1, (SIDE // 2, 2, SIDE // 2, 2))
    assert float((cells - cells.mean(dim=(2, 4), keepdim=True)).std()) == pytest.approx(
        0.3 * 0.75**0.5, rel=0.05
    )


@pytest.mark.parametrize("done", [0.0, 1.0])
def test_majority_asks_for_the_most_frequent_colour_by_a_margin_that_falls(done):
    images = TASKS["majority"].draw(15, 8, torch.Generator().manual_seed(0), done)
    counts = images.cells[:, :, KEY_BITS : KEY_BITS + VALUES].sum(dim=1)
    assert (counts.argmax(dim=1) == images.answers[:, 0]).all()
    first, second = counts.topk(2).values.unbind(dim=1)
    assert float((first - second).mean()) / SIDE**2 == pytest.approx(
        0.15 if done else 0.6, abs=0.02
    )


def test_a_training_begins_with_the_easy_level_where_a_task_says_so():
    task = TASKS["regions"]
    batches = list(task.batches(8, steps=20, generator=torch.Generator().manual_seed(0)))
    assert len(batches) == 20
    # With 4 keys an image has few keys; with regions of its own, many.
    kinds = [len(batch.cells[:, :, :KEY_BITS].flatten(0, 1).unique(dim=0)) / 8 for batch in batches]
    assert max(kinds[:8]) <= 4 < 20 < min(kinds[8:])
