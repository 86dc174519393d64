"""The report of a sweep, of made-up points whose growth is known."""

import re
from itertools import pairwise

import pytest

from bench.errors import InputError
from bench.record import Record, key, write
from report.columns import MISSING
from report.plots import looks
from report.sweep import alike, frame, summaries
from report.sweep import points as point_table
from report.sweep import write as write_page
from report.sweep_plots import against_resolution
from tests.records import MODEL, plain

SIDES = (224, 320, 448, 640, 896)
# Multiply-adds, bytes and nanoseconds: factor and exponent of the pixels.
COSTS = {
    "full": {"flops": (1.0, 2.0), "memory": (1e3, 1.0), "latency": (1e-3, 2.0)},
    "performer": {"flops": (1e5, 1.0), "memory": (2e3, 1.0), "latency": (1e3, 1.0)},
    "ViL": {"flops": (2e5, 1.0), "memory": (5e2, 1.0), "latency": (2e2, 1.0)},
}
FAMILY = {"ViL": "longformer"}
QUANTITIES = ("flops", "memory", "latency")


def point(row, side, mode="inference", *, batch=1, what=QUANTITIES, error=None, created=0, scale=1):
    cost = {name: f * (side * side) ** e * scale for name, (f, e) in COSTS[row].items()}
    config = {
        "profile": {"image_size": [side, side], "batch_size": batch},
        "train": {"precision": "32-true"},
        "sweep": {"scope": "backbone", "mode": mode, "what": list(what)},
    }
    seconds = cost["latency"] * 1e-9
    measured = error is None
    modes = {"inference": None, "training": None}
    return plain(
        suite="sweep",
        row=row,
        key=key({**config, "row": row, "created": created}),
        status="done" if measured else "failed",
        error=None if measured else {"kind": error, "message": f"why {side}"},
        created=f"2025-01-01T00:00:{created:02d}",
        config=config,
        environment={
            "device": "cpu",
            "command": "python -m bench sweep",
            "packages": {"torch": "2.11"},
            "limits": {"memory": side, "seconds": 60.0},
        },
        model=MODEL
        | dict.fromkeys(("method", "library"), "none")
        | {"backbone": "ViL-Tiny", "attention": FAMILY.get(row, row)},
        flops={"unit": "multiply-adds", "convention": "actual", "total": round(cost["flops"])}
        if "flops" in what
        else None,
        memory={"unit": "bytes", "kind": "live tensor bytes", **modes, mode: round(cost["memory"])}
        if "memory" in what and measured
        else None,
        latency={
            "unit": "s",
            **modes,
            mode: {
                "samples": [seconds] * 3,
                "median": seconds,
                "q1": 0.98 * seconds,
                "q3": 1.05 * seconds,
            },
            "ran": {"sdpa": {"flash": 3}, "dtypes": ["float32"], "compiled": False},
        }
        if "latency" in what and measured
        else None,
        notes=[f"{side:,} made for one size"] if row == "ViL" else [],
    )


def points(rows=tuple(COSTS), sides=SIDES, mode="inference", **options):
    return [point(row, side, mode, **options) for row in rows for side in sides]


def out_of_memory():
    """Full attention runs out of memory at 640."""
    ends = [point("full", 640, error="out_of_memory"), point("full", 896, error="skipped")]
    return [*points(["full"], SIDES[:3]), *ends, *points(["performer", "ViL"])]


def test_growth_and_crossover_of_each_quantity():
    (table,) = summaries(frame(points()))
    raw = table.raw.set_index("row")
    assert raw.loc["full", "flops_exponent"] == pytest.approx(2.0, abs=1e-6)
    assert raw.loc["performer", "latency_exponent"] == pytest.approx(1.0, abs=1e-6)
    assert raw.loc["performer", "flops_crossover_pixels"] == pytest.approx(1e5, rel=1e-6)
    shown = table.shown.set_index("row")
    assert shown.loc["performer"].tolist() == [
        "1.00 ± 0.00",
        "1.00 ± 0.00",
        "1.00 ± 0.00",
        "from 316 px",
        "not up to 896 px",
        "not up to 896 px",
        "896",
    ]
    assert shown.loc["ViL (longformer)", "memory below full"] == "below 224 px"
    assert shown.loc["ViL (longformer)", "latency below full"] == "from 447 px"
    assert (shown.loc["full"].filter(like="below full") == MISSING).all()


def test_modes_and_batch_sizes_stand_apart():
    data = [*points(), *points(mode="training"), *points(mode="training", batch=4)]
    titles = [table.title for table in summaries(frame(data))]
    assert [title.removeprefix("Growth and crossover, ") for title in titles] == [
        "inference, batch of 1",
        "training, batch of 1",
        "training, batch of 4",
    ]
    assert len({table.name for table in summaries(frame(data))}) == 3


def test_without_full_attention_there_are_no_crossovers():
    (table,) = summaries(frame(points(["performer"])))
    assert table.shown.filter(like="below full").eq(MISSING).all(axis=None)
    assert any("without the row 'full'" in note for note in table.notes)


def test_out_of_memory_is_said_and_compared_only_where_both_were_measured():
    (table,) = summaries(frame(out_of_memory()))
    shown = table.shown.set_index("row")
    assert shown.loc["full", "measured up to, px"] == "448; 640 out of memory"
    # Nothing is claimed of sizes at which full attention has no latency.
    assert shown.loc["performer", "latency below full"] == "not up to 448 px"
    assert shown.loc["ViL (longformer)", "latency below full"] == "from 447 px"
    raw = point_table(frame(out_of_memory())).raw
    assert raw["error"].dropna().tolist() == ["out_of_memory", "skipped"]
    assert raw["flops_multiply_adds"].notna().all()


def test_a_quantity_comes_from_the_newest_record_that_has_it():
    old = point("full", 224, created=1)
    newer = point("full", 224, created=2, what=("flops", "memory"), scale=3)
    failed = point("full", 224, created=3, error="too_slow", what=("latency",))
    data = frame([old, newer, failed])
    assert len(data) == 1
    assert data.loc[0, "memory"] == newer.memory["inference"]
    assert data.loc[0, "latency"] == old.latency["inference"]["median"]
    assert data.loc[0, "error"] == "too_slow"


def test_only_points_under_the_same_conditions_share_a_page(tmp_path):
    every = [*points(), *points(mode="training")]
    for one in every:
        write(one, tmp_path / "records")
    other = point("full", 1000)
    other.config["train"]["precision"] = "bf16-mixed"
    elsewhere = point("full", 1001)
    elsewhere.environment["cpu"] = "another"
    for one in (other, elsewhere):
        write(one, tmp_path / "records")
    assert len(alike(every[:1], tmp_path)) == len(every)
    assert alike([other], tmp_path) == [other]
    assert alike([elsewhere], tmp_path) == [elsewhere]


def test_the_page_has_everything_and_the_same_bytes_twice(tmp_path):
    data = out_of_memory()
    for one in data[:3]:
        assert one.latency is not None
        one.latency["notes"] = ["inference: loaded machine: others kept 1 of 2 cores busy"]
    page = write_page(data, tmp_path / "one")
    write_page(data, tmp_path / "two")
    text = page.read_text()
    assert text.startswith("# Cost against resolution: ViL-Tiny, 32-true, cpu\n")
    assert "out of memory" in text
    # Of notes that differ in numbers alone, one.
    assert text.count("made for one size") == 1
    assert f"{SIDES[-1]}x{SIDES[-1]} and {len(SIDES) - 1} smaller: {SIDES[-1]:,} made" in text
    assert "Measured 2025-01-01 with torch 2.11;" in text
    assert "Doubts about latencies, and of how many points: loaded machine (3)." in text
    assert re.search(r"full +\| inference +\| +640 .*\| out of memory +\| why 640", text)
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")}
    assert len([name for name in names if name.suffix == ".png"]) == 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nothing_is_drawn_or_fitted_of_rows_whose_flops_are_incomplete(tmp_path):
    """At some sizes, as of code that takes a kernel for long sequences, or at all."""
    data = points()
    for one in data:
        large = max(one.config["profile"]["image_size"]) > SIDES[2]
        if one.flops and (one.row == "ViL" or (one.row == "performer" and large)):
            one.flops["uncounted"] = {"mine.op": 1}
    text = write_page(data, tmp_path).read_text()
    assert "FLOPs not drawn, as incomplete: performer, ViL" in text
    (table,) = summaries(frame(data))
    fitted = table.raw.set_index("row")["flops_exponent"].dropna()
    assert fitted.index.tolist() == ["full"]
    drawn = (tmp_path / "plots" / "flops-inference.svg").read_text()
    assert drawn.count(r"\propto") == 1
    assert (tmp_path / "plots" / "memory-inference.svg").read_text().count(r"\propto") == 3


@pytest.fixture
def axes():
    """The axes of a plot."""

    def draw(data, quantity="latency"):
        style = looks(list(data["family"].unique()))
        return against_resolution(data, style, quantity).axes[0]

    return draw


def test_a_plot_marks_crossovers_failures_and_labels(axes):
    ax = axes(frame(out_of_memory()))
    texts = sorted(ax.texts, key=lambda text: text.get_window_extent().y0)
    labels = [text.get_text() for text in texts]
    assert [label.split()[0] for label in labels] == ["full", "ViL", "performer"]
    assert "from 447 px" in labels[1]
    rings = [line for line in ax.lines if line.get_markersize() == 9]
    assert [round(float(ring.get_xdata()[0])) for ring in rings] == [447]
    # 200 ns for each of 2e5 pixels, as full attention's 1e-3 ns for each pair.
    assert [float(ring.get_ydata()[0]) for ring in rings] == [pytest.approx(40, rel=1e-3)]
    (failure,) = [line for line in ax.lines if line.get_marker() == "X" and len(line.get_xdata())]
    # Where the growth of the sizes before would put it: 2 ms of pixels squared.
    assert float(failure.get_xdata()[0]) == pytest.approx(640)
    assert float(failure.get_ydata()[0]) == pytest.approx(1e-12 * 640**4 * 1e3, rel=1e-3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["out of memory"]


def test_labels_of_many_lines_do_not_overlap(axes):
    every = [*COSTS, *(f"{row} {i}" for i in range(3) for row in COSTS)]
    data = frame(
        [
            Record(**vars(point(row.split(" ")[0], side)) | {"row": row})
            for row in every
            for side in SIDES
        ]
    )
    ax = axes(data, "memory")
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 12
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))
    assert {round(box.x0) for box in boxes} == {round(boxes[0].x0)}
    assert boxes[0].x0 > ax.bbox.x1
    figure = ax.figure.bbox
    assert all(figure.y0 <= box.y0 < box.y1 <= figure.y1 for box in boxes)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the report"):
        write_page(points(), tmp_path / "file")
