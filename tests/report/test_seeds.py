"""Rows of several seeds: what is merged, and how sure it then is."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as images

from bench import record as store
from bench.record import PICTURES, SCHEMA, Record, done_name
from report import compare, confidence, load, page, pictures, plots, seeds, tables
from tests.records import changed
from tests.report.test_confidence import common, evaluated
from tests.report.test_report import drawn, failed, make


def seeded(row: str, seed: int, shift: float = 0.0, **changes: Any) -> Record:
    """A record of `row` with a seed, whose draws are those of all rows moved by `shift`."""
    return with_seed(evaluated(row, common(shift)), seed, **changes)


def with_seed(one: Record, seed: int, **changes: Any) -> Record:
    config = {**one.config, "seed": seed}
    return replace(one, seed=seed, config=config, key=store.key(config), **changes)


def test_a_row_is_the_mean_of_its_seeds() -> None:
    trained = [seeded("ViL", 0, -1), seeded("ViL", 1, 0.5), seeded("ViL", 2, 2)]
    (row,) = seeds.merged([trained[2], *trained[:2]])
    values = [load.at(one, "evaluation.box.AP") for one in trained]
    assert load.at(row, "evaluation.box.AP") == pytest.approx(np.mean(values))
    assert load.at(row, "evaluation.seeds.box_sd") == pytest.approx(np.std(values, ddof=1))
    assert load.at(row, "evaluation.seeds.box_AP") == values
    data = load.frame([row])
    same = ["parameters", "flops", "memory_inference", "memory_training", "latency"]
    assert data[same].equals(load.frame(trained[:1])[same])
    assert data["seeds"].tolist() == ["0, 1, 2"]
    assert data["box_low"][0] < min(values) < max(values) < data["box_high"][0]
    (table,) = tables.comparison(trained)
    assert table.raw["row"].tolist() == ["ViL"]
    assert seeds.merged([row]) == [row]
    # Of masks that one seed lacks there is no mean.
    last = trained[2]
    (row,) = seeds.merged([*trained[:2], changed(last, {"evaluation.mask": None})])
    assert (row.evaluation or {})["mask"] is None


def test_steps_and_images_a_second_of_seeds_are_of_the_same_time() -> None:
    trained = [
        changed(
            seeded("ViL", seed),
            {"training.seconds": 600 / rate, "training.images_per_second": rate},
        )
        for seed, rate in enumerate((60.0, 20.0))
    ]
    (row,) = seeds.merged(trained)
    (line,) = load.frame([row]).to_dict("records")
    assert line["train_seconds"] == 20
    assert line["images_per_second"] == pytest.approx(1200 / 40)


def test_what_is_no_seed_of_the_same_row_stays_apart() -> None:
    one = make("ViL")
    others = {
        "config.train.steps": 9,
        "environment.inputs": {"mechanism": {"mine.py": "abc"}},
        "config.data.generated": {"seed": 1},
    }
    apart = [with_seed(changed(one, {place: value}), 1) for place, value in others.items()]
    assert len(seeds.merged([one, *apart])) == 4
    elsewhere = {"annotations_sha256": "def"}
    on_images = [evaluated("ViL", common()), with_seed(evaluated("ViL", common(), **elsewhere), 1)]
    assert len(seeds.merged(on_images)) == 2
    # Two machines, two seeds each, are two rows.
    there = changed(one, {"environment.cpu": "Another processor"})
    both = [with_seed(machine, seed) for machine in (one, there) for seed in (0, 1)]
    assert [load.at(row, "environment.cpu") for row in seeds.merged(both)] == [
        one.environment["cpu"],
        "Another processor",
    ]


def test_seeds_that_were_searched_before_are_merged_too() -> None:
    old = [replace(with_seed(make("ViL"), seed), row=f"ViL (seed={seed})") for seed in (0, 1)]
    assert [row.row for row in seeds.merged(old)] == ["ViL"]
    assert tables.searches(old) == []


def test_the_best_value_of_a_search_is_that_of_the_mean_over_seeds() -> None:
    shifts = {0.1: (0, 3), 0.2: (2, 2)}
    tried = []
    for value, of_seeds in shifts.items():
        for seed, shift in enumerate(of_seeds):
            one = seeded(f"ViL (drop_path={value})", seed, shift)
            tried.append(with_seed(changed(one, {"config.model": {"drop_path": value}}), seed))
    (table,) = tables.searches(tried)
    assert table.raw[table.raw["best"]]["value"].tolist() == ["0.2"]


def test_a_seed_that_failed_is_said_and_left_out(tmp_path: Path) -> None:
    records = [seeded("ViL", 0), seeded("ViL", 1, 1), with_seed(failed("ViL"), 2)]
    (row,) = seeds.merged(records)
    assert row.status == "done"
    assert seeds.listed(row) == "0, 1"
    text = page.write(records, tmp_path, title="Suite").read_text()
    assert "1 row, of which 0 failed" in text
    assert "Seed 2 of ViL failed and is not in its mean" in text
    assert "ViL (seed 2) failed, out of memory" in text


def test_rows_of_one_name_that_differ_in_more_than_seeds_are_not_called_by_them() -> None:
    before = [seeded("ViL", seed) for seed in (0, 1)]
    inputs = {"mechanism": {"mine.py": "another"}}
    after = replace(changed(seeded("ViL", 1), {"environment.inputs": inputs}), key="f" * 64)
    rows = seeds.merged([*before, after])
    names = load.labels(rows)
    assert [name.partition("#")[0] for name in names] == ["ViL ", "ViL "]
    said = seeds.sentence(dict(zip(names, rows, strict=True)))
    assert f"seeds 0, 1 ({names[1]}: 1)" in said
    assert load.labels(before) == ["ViL (seed 0)", "ViL (seed 1)"]


def test_the_page_says_that_seeds_were_not_varied(tmp_path: Path) -> None:
    text = page.write([seeded("ViL", 0), seeded("full", 0)], tmp_path, title="Suite").read_text()
    assert "what another seed would change was not measured" in text
    assert "It knows nothing of the training's seed" in text


def test_a_row_that_failed_with_every_seed_was_trained_with_none(tmp_path: Path) -> None:
    records = [seeded("ViL", 0), seeded("ViL", 1, 1), failed("full")]
    text = page.write(records, tmp_path, title="Suite").read_text()
    assert "mAP is the mean of the trainings with seeds 0, 1." in text
    assert "trained with one seed" not in text.replace("where a row was trained with one seed", "")


def test_rows_of_one_seed_beside_those_of_several_are_said(tmp_path: Path) -> None:
    records = [seeded("ViL", 0), seeded("ViL", 1, 1), seeded("full", 0)]
    text = page.write(records, tmp_path, title="Suite").read_text()
    assert "The interval of full, trained with one seed, knows nothing of other seeds" in text
    assert "what another seed changes of full (--seeds 3)" in text
    compared = compare.shown(compare.compare(records[:1], records[:2]))
    assert any("Rows of one seed" in note for note in compared.notes)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_an_interval_of_seeds_and_images_holds_the_truth_as_often_as_it_says(count: int) -> None:
    """Two rows that are equal in truth, whose trainings differ by more than images do."""
    random, trials = np.random.default_rng(count), 400
    images = random.multinomial(60, np.full(60, 1 / 60), size=300) / 60
    held = 0
    for _ in range(trials):
        of_images = random.normal(0, 2, 60) + random.normal(0, 2, (count, 60))
        difference = random.normal(0, 1, (count, 1)) + of_images
        drawn_means = seeds.draws(difference @ images.T, range(count)).tolist()
        limits = seeds.interval(float(difference.mean()), drawn_means, least=-100)
        assert limits is not None
        held += limits[0] <= 0 <= limits[1]
    assert 0.92 <= held / trials <= 0.985


def test_rows_share_a_rank_where_seeds_cannot_tell_them_apart() -> None:
    shifts = {"ViL": (5, 5.2, 5.1), "full": (5.4, 4.9, 5.3), "performer": (0, 0.2, 0.1)}
    records = [
        seeded(row, seed, shift)
        for row, of_row in shifts.items()
        for seed, shift in enumerate(of_row)
    ]
    (table,) = confidence.intervals(records)
    ranks = dict(zip(table.shown["row"], table.shown["rank"], strict=True))
    assert ranks == {"ViL": "1", "full": "1", "performer": "3"}
    # One seed alone would have told them apart.
    (alone,) = confidence.intervals([record for record in records if record.seed == 0])
    assert alone.shown["rank"].tolist() == ["2", "1", "3"]
    assert "± %" in table.shown
    assert "± %" not in alone.shown


def test_accuracy_has_error_bars_and_losses_a_line_a_seed() -> None:
    records = [seeded(row, seed, seed) for row in ("ViL", "full") for seed in range(3)]
    rows = seeds.merged(records)
    lines = [
        one.get_segments()[0] for one in drawn(rows).collections if hasattr(one, "get_segments")
    ]
    limits = load.at(rows[0], "evaluation.box_interval.AP")
    assert any(line[:, 1].tolist() == pytest.approx(limits) for line in lines)
    style = plots.looks(["longformer", "full"])
    library = load.Library(rows, load.frame(rows))
    for figure in (plots.losses(library, style), plots.ranks(library, style)):
        assert not isinstance(figure, str)
        lines = figure.axes[0].lines
        # The losses of one row; the seeds of both rows.
        assert len(lines) == 4
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1"]
    assert len(lines[0].get_xdata()) == 3


def test_pictures_are_of_one_seed_and_outline_what_a_query_sees(tmp_path: Path) -> None:
    records = [seeded(row, seed, 0) for row in ("ViL", "full") for seed in range(3)]
    png = io.BytesIO()
    images.imsave(png, np.zeros((12, 16)), format="png")
    shown = {"png": base64.b64encode(png.getvalue()).decode(), "truth": [], "found": []}
    values = np.zeros((3, 4))
    values[1:, 1:3] = 1
    for record in records:
        if record.seed == 0:
            continue
        content = {"schema": SCHEMA, "key": record.key, "least_score": record.seed}
        content |= {"images": [shown], "sees": {"query": [1, 1], "values": values.tolist()}}
        path = tmp_path / PICTURES / done_name(record.row, record.key)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    found = pictures.load(records, tmp_path)
    assert {name: one["least_score"] for name, one in found.items()} == {"ViL": 1, "full": 1}
    # Cells are 4 pixels wide; the border is that of 2 by 2 of them.
    ax = pictures.sight(found).axes[0]
    ends = [line for part in ax.collections for line in part.get_segments()]
    assert len(ends) == 8
    assert np.concatenate(ends).min(axis=0).tolist() == [4, 4]
    assert np.concatenate(ends).max(axis=0).tolist() == [12, 12]
