"""The report over made-up records: twelve rows that look like a suite's."""

import functools
import html
import json
import operator
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import cli
from bench import record as store
from bench.errors import InputError
from bench.record import Record
from report import front, load, page, plots, provenance, tables
from report.columns import AT_LEAST, MISSING, Table
from tests.records import changed

ROWS = [
    "srformer/64",
    "srformer/32",
    "Partial srformer/32",
    "global",
    "Partial global",
    "performer",
    "Partial performer",
    "ViL",
    "Partial ViL",
    "full",
    "linformer",
    "Partial linformer",
]
FAMILY = {"ViL": "longformer", "srformer/64": "srformer", "srformer/32": "srformer"}
Make = Callable[..., Record]


def make(row: str, number: int = 0, **changes: Any) -> Record:
    """A made-up record of `row` that went well."""
    random = np.random.default_rng(number)
    base = row.removeprefix("Partial ")
    family = FAMILY.get(base, base)
    partial = row != base
    cost = 1.4e9 * (1.15 if partial else 1) * (1 + 0.05 * random.random())
    seconds = cost * 1e-10 * (1 + 0.2 * random.random())
    samples = seconds * (1 + 0.05 * random.standard_normal(20))
    q1, median, q3 = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    box, steps = 20 + 10 * random.random(), np.arange(10, 321, 10)
    loss = 1.2 + 4 * np.exp(-steps / 90) + 0.15 * random.standard_normal(len(steps))
    config: dict[str, Any] = {
        "suite": "quick",
        "row": row,
        "seed": 0,
        "model": {"arch": f"l1,h2,d32_{row}", "drop_path": 0.0},
        "data": {"path": None},
        "train": {"steps": 320, "precision": "32-true", "init": None},
    }
    figures = {figure: box + 2 * place - 8 for place, figure in enumerate(store.FIGURES, 4)}
    values: dict[str, Any] = {
        "suite": "quick",
        "row": row,
        "key": store.key(config),
        "status": "done",
        "created": f"2025-01-02T03:{number:02d}:00+00:00",
        "seed": 0,
        "config": config,
        "environment": {
            "python": "3.12.1",
            "platform": "Linux-x86_64",
            "cpu": "A processor of 2 cores",
            "cores": 2,
            "memory_bytes": 16_000_000_000,
            "device": "cpu",
            "packages": {"torch": "2.11.0", "torchvision": "0.26.0"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "command": "python run_all.py",
        },
        "model": {
            "backbone": "ViL-Quick",
            "method": "mask_rcnn",
            "library": "torchvision",
            "library_version": "0.26.0",
            "attention": f"{family} / full" if partial else family,
            "arch": config["model"]["arch"],
            "drop_path": 0.0,
            "schedule": "quick",
        },
        "parameters": {"total": 2_100_000 + 10_000 * number, "by_part": {"stage1": 20_000}},
        "flops": {
            "unit": "multiply-adds",
            "convention": "actual",
            "image_size": [128, 160],
            "proposals": 1000,
            "total": int(cost),
            "by_part": {},
            "by_operator": {},
            "uncounted": {},
        },
        "memory": {
            "unit": "bytes",
            "kind": "live tensor bytes",
            "device": "cpu",
            "batch_size": 8,
            "image_size": [128, 160],
            "precision": "32-true",
            "inference": int(1e8 + 3e7 * random.random()),
            "training": int(4e8 + 2e8 * random.random()),
        },
        "latency": {
            "unit": "s",
            "device": "cpu",
            "batch_size": 8,
            "image_size": [128, 160],
            "precision": "32-true",
            "threads": 2,
            "inference": {"samples": samples.tolist(), "median": median, "q1": q1, "q3": q3},
            "training": {"samples": [], "median": 3 * median, "q1": 3 * q1, "q3": 3 * q3},
            "notes": [],
        },
        "training": {
            "steps": 320,
            "seconds": 80.0 + number,
            "batch_size": 8,
            "images_per_second": 32.0,
            "losses": [
                {"step": int(step), "lr": 1e-3, "total": float(value)}
                for step, value in zip(steps, loss, strict=True)
            ],
            "resumed": 0,
        },
        "evaluation": {
            "split": "val2017",
            "images": 100,
            "seconds": 12.0,
            "unit": "percent",
            "box": figures,
            "mask": {figure: value - 2.5 for figure, value in figures.items()},
        },
        "notes": [],
    }
    return Record(**(values | changes))


def failed(row: str, number: int = 0, **changes: Any) -> Record:
    """A made-up record of `row` that ran out of memory while training."""
    error = {
        "kind": "out_of_memory",
        "message": "tried to allocate 12 GB for a | b <matrix>",
        "traceback": "Traceback:\n  ```\nMemoryError: <12 GB>",
    }
    nothing = dict.fromkeys(("memory", "latency", "training", "evaluation"))
    return make(row, number, status="failed", error=error, **(nothing | changes))


@pytest.fixture
def records() -> list[Record]:
    made = [make(row, number) for number, row in enumerate(ROWS)]
    made[9] = failed("full", 9)
    return made


def as_published(row: str, number: int) -> Record:
    """A made-up record of `row` in the architecture and schedule of the published one."""
    record = make(row, number)
    arch = load.published().set_index("row").loc[row, "arch"]
    return changed(record, {"model.arch": arch, "model.schedule": "1x"})


def save(records: list[Record], directory: Path) -> None:
    for record in records:
        store.write(record, directory / "records")


def test_load_prefers_success_and_orders_by_the_publication(tmp_path: Path) -> None:
    records = [make(row, number) for number, row in enumerate(ROWS)]
    save([failed("ViL", 7, created="2026-01-01T00:00:00+00:00"), *reversed(records)], tmp_path)
    loaded = load.load(tmp_path)
    assert [record.row for record in loaded] == ROWS
    assert all(record.status == "done" for record in loaded)


def test_load_takes_the_newest_failure(tmp_path: Path) -> None:
    times = ["2025-01-01T00:00:02+00:00", "2025-01-01T00:00:03+00:00", "2025-01-01T00:00:01+00:00"]
    save([failed("ViL", created=time) for time in times], tmp_path)
    assert [record.created for record in load.load(tmp_path)] == [times[1]]


def test_load_takes_the_newest_success_and_names_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = ["2025-01-01T00:00:02+00:00", "2025-01-01T00:00:03+00:00", "2025-01-01T00:00:01+00:00"]
    for number, time in enumerate(times):
        one = make("ViL", created=time)
        path = tmp_path / "records" / f"{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(one.to_json())
    assert [record.created for record in load.load(tmp_path)] == [times[1]]
    said = sorted(message.partition(", as")[0] for message in caplog.messages)
    assert said == [f"left out of the report: ViL of {time}" for time in (times[2], times[0])]


def test_a_copied_folder_adds_no_rows(tmp_path: Path) -> None:
    save([make("ViL"), make("global", 1)], tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    found = [one for name in ("run", "copy") for one in load.load(tmp_path / name)]
    assert [record.row for record in load.ordered(found)] == ["global", "ViL"]


def test_load_leaves_out_a_corrupt_file_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save([make("ViL"), make("global", 1)], tmp_path)
    broken = tmp_path / "records" / "broken.json"
    broken.write_text(next(tmp_path.glob("records/vil*")).read_text()[:100])
    assert [record.row for record in load.load(tmp_path)] == ["global", "ViL"]
    assert "broken.json" in caplog.text


def test_load_reads_a_plain_folder_of_records(tmp_path: Path) -> None:
    store.write(make("ViL"), tmp_path)
    assert len(load.load(tmp_path)) == 1
    assert load.load(tmp_path / "nothing") == []


def test_frame_has_the_units_of_the_record_and_one_type_a_column(records: list[Record]) -> None:
    data = load.frame(records)
    assert len(data) == len(ROWS)
    assert data["parameters"].dtype == "Int64"
    assert data["latency"].dtype == "Float64"
    record = records[3]
    assert record.memory is not None
    assert data["memory_training"].tolist()[3] == record.memory["training"]
    assert data["error_kind"].tolist()[9] == "out_of_memory"
    assert data["latency"].isna().tolist() == [row == "full" for row in ROWS]
    assert data["family"].tolist()[7:9] == ["longformer", "longformer"]
    assert load.frame([]).dtypes.equals(data.dtypes)


def test_rows_of_one_name_get_labels_that_tell_them_apart() -> None:
    other = make("ViL", config={"seed": 1}, key=store.key({"seed": 1}))
    labels = load.frame([make("ViL"), other, make("global")])["label"].tolist()
    assert len(set(labels)) == 3
    assert labels[2] == "global"
    # The same run on two machines.
    labels = load.frame([make("ViL"), make("ViL", created="2026-02-03T04:05:06+00:00")])["label"]
    assert labels.tolist() == ["ViL of 2025-01-02T03:00:00", "ViL of 2026-02-03T04:05:06"]


def test_comparison_keeps_failures(records: list[Record]) -> None:
    (table,) = tables.comparison(records)
    assert table.shown.loc[9, "row"] == "full (failed: out of memory)"
    assert table.shown.loc[9, "box mAP %"] == MISSING
    assert table.shown.loc[9, "params M"] != MISSING
    assert table.raw.loc[9, "error"] == "out_of_memory"


def test_rows_say_what_they_started_from_where_that_differs() -> None:
    def labels(*starts: str | None) -> list[str]:
        found = []
        for number, start in enumerate(starts):
            found.append(changed(make(f"row {number}"), {"config.train.init": start}))
        (table,) = tables.comparison(found)
        return list(table.shown["row"])

    assert labels("a/vil.pth", "b/vil.pth") == ["row 0", "row 1"]
    assert labels("a/vil.pth", None) == ["row 0 (from vil.pth)", "row 1 (from scratch)"]


@pytest.mark.parametrize("build", [tables.comparison, tables.figures, tables.details])
def test_text_fits_120_columns(
    records: list[Record], build: Callable[[list[Record]], list[Table]]
) -> None:
    long = make("my_module.with_a_long_name:MyAttention", 13, notes=["a note " * 30])
    (table,) = build([*records, long])
    text = tables.to_text(table.shown, width=120)
    assert max(len(line) for line in text.splitlines()) <= 120
    for row in ("srformer/64", "performer", "linformer"):
        assert f"{row} " in text


def test_boxes_alone_have_one_line_a_row() -> None:
    (table,) = tables.figures([changed(make("ViL"), {"evaluation.mask": None})])
    assert table.shown["of"].tolist() == ["box"]
    assert list(table.shown.columns) == ["row", "of", *store.FIGURES]


def test_formats_escape_what_would_break_them() -> None:
    (table,) = tables.comparison([failed("a|b <i> & 5_%", 1)])
    assert r"a\|b \<i>" in tables.to_markdown(table.shown)
    latex = tables.to_latex(table.shown)
    assert r"\& 5\_\%" in latex
    assert r"\toprule" in latex
    assert r"box mAP \%" in latex


NAMES = [
    "<b>a</b>",
    "a < b > c",
    "R&D &amp; &lt;x>",
    "_first_ __all__ in_between",
    "a|b",
    "c:\\new\\table",
    "*x* `y` ~~z~~ 1~2~3",
    "[a](b) [c] ![d](e)",
    "$x$ and $\\frac$",
    "{x}^2 #1 5%",
    "- no list",
    "# no heading",
    "1. no number",
    "> no quote",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are_in_markdown(name: str) -> None:
    table = pd.DataFrame({name: [name], "AP": ["1.0"]})
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = reader.render(tables.to_markdown(table))
    heading, _, cell, _ = re.findall(r"<t[hd].*?>(.*?)</t[hd]>", shown)
    assert html.unescape(heading) == html.unescape(cell) == name
    text = page._render("page.md.jinja", name, [page.Section(name, [name])], name)
    first, made, second, block = reader.render(text).splitlines()
    for shown, tag in ((first, "h1"), (made, "p"), (second, "h2"), (block, "p")):
        assert html.unescape(shown) == f"<{tag}>{name}</{tag}>"


def test_names_are_shown_as_they_are_in_latex_and_pictures(tmp_path: Path) -> None:
    latex = tables.to_latex(pd.DataFrame({"a<b": ["[x] | c\\d > 1"], "*": ["*~^"]}), caption="e<f")
    cell = r"{[}x] \textbar{} c\textbackslash{}d \textgreater{} 1"
    assert rf"{cell} & {{*}}\textasciitilde{{}}\textasciicircum{{}} \\" in latex
    assert r"a\textless{}b & {*} \\" in latex
    assert r"\caption{e\textless{}f}" in latex
    name = "a$\\frac$b \U00013000"
    text = page.write([make(name)], tmp_path, title=name).read_text()
    assert (tmp_path / "plots" / "ranks.png").is_file()
    # No font of Matplotlib's has hieroglyphs.
    assert text.count("Drawn as boxes, as no font here has them: \U00013000.") > 1


def test_commands_that_differ_in_their_rows_alone_are_one() -> None:
    say = "python run_all.py --rows {} --output x --seed {}"
    found = [say.format(row, seed) for seed in (0, 1) for row in ("ViL", "'Partial ViL'", "a/b")]
    made = [replace(make("ViL"), environment={"command": one}) for one in [*found, "other"]]
    assert page.run_again(made, "").blocks[1] == page.Code(
        "\n".join([*(say.format("'ViL,Partial ViL,a/b'", seed) for seed in (0, 1)), "other"])
    )


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (
            "evaluation.box.AP",
            [15.0],
            "evaluation.box.AP is [15.0]: Input should be a valid number",
        ),
        ("evaluation.box.AP", "15", "evaluation.box.AP is '15': Input should be a valid number"),
        # No mean holds a figure that is not one, nor -1, COCO's for none.
        ("evaluation.box.AP", float("nan"), "evaluation.box.AP is nan: Input should be"),
        ("evaluation.box.AP", -1, "evaluation.box.AP is -1: Input should be greater"),
        ("evaluation.box_interval", {"AP": [1.0, 2.0]}, "outside of its interval [1.0, 2.0]"),
        ("latency.inference.median", float("inf"), "latency.inference.median is inf"),
        ("flops.total", -5, "flops.total is -5"),
        ("memory.unit", "MB", "memory.unit is 'MB': Input should be 'bytes'"),
        ("flops.unit", "FLOPs", "flops.unit is 'FLOPs': Input should be 'multiply-adds'"),
        ("latency.unit", "ms", "latency.unit is 'ms': Input should be 's'"),
        ("row", "swin", "row is 'swin', and 'ViL' in its config"),
        ("seed", 7, "seed is 7, and 0 in its config"),
        ("suite", "ablation", "suite is 'ablation', and 'quick' in its config"),
        ("evaluation.also", [{"split": "x"}], "evaluation.also.0.box"),
        ("latency.inference.samples", 0.3, "latency.inference.samples is 0.3"),
        ("flops.image_size", "128x160", "flops.image_size is '128x160'"),
        ("memory.training", 1.5, "memory.training is 1.5"),
        ("training.losses", {"total": 1}, "training.losses is {'total': 1}"),
        ("config.train", [], "config.train is []"),
        ("environment.packages", "torch", "environment.packages is 'torch'"),
        ("model.drop_path", "0.1", "model.drop_path is '0.1'"),
        ("created", "yesterday", "created is 'yesterday'"),
        ("notes", [1], "notes.0 is 1"),
    ],
)
def test_a_record_edited_by_hand_is_one_line(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    refusal: Callable[..., str],
    place: str,
    value: Any,
    said: str,
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    store.write(make("full"), good / "records")
    path = store.write(make("ViL", 1), bad / "records")
    values = json.loads(path.read_text())
    *above, last = place.split(".")
    functools.reduce(operator.getitem, above, values)[last] = value
    path.write_text(json.dumps(values))
    assert said in refusal(cli.main, "recommend", bad)
    for arguments in (["report", bad], ["compare", good, bad]):
        refusal(cli.main, *arguments)
    assert load.load(bad) == []
    assert said in caplog.text
    with pytest.raises(InputError, match="delete it to make it again"):
        list(store.read_all((bad / "records").iterdir()))


def test_latencies_edited_by_hand_are_named(tmp_path: Path) -> None:
    record = changed(make("full"), {"latency.inference": {"median": "3"}})
    store.write(make("full"), tmp_path / "records")
    path = tmp_path / "latency" / "20250102T030405.json"
    path.parent.mkdir()
    rows = [{"row": record.row, "key": record.key, "latency": record.latency}]
    path.write_text(json.dumps({"rows": rows}))
    with pytest.raises(InputError, match=r"0405\.json .*latency\.inference\.median is '3'"):
        load.load(tmp_path)


def test_libraries_never_share_a_table_or_plot(records: list[Record]) -> None:
    model = {**records[0].model, "library": "detectron2"}
    mixed = [make("srformer/64", model=model), *records[1:]]
    built = tables.comparison(mixed)
    assert [len(table.raw) for table in built] == [1, 11]
    assert len({table.name for table in built}) == 2
    assert all(table.raw["library"].nunique() == 1 for table in built)
    names = [plot.name for plot in plots.draw(mixed)]
    assert len(names) == len(set(names)) == 12


def test_published_rows_are_compared_only_where_they_are_the_same_model() -> None:
    assert tables.against_published([make("ViL")]) is None
    table = tables.against_published([make("global"), as_published("ViL", 1)])
    assert table is not None
    assert table.raw["row"].unique().tolist() == ["ViL"]
    # 100 generated images say nothing about COCO, nor tensors on a CPU about a GPU.
    assert table.raw["quantity"].tolist() == ["params M", "FLOPs G"]
    params = table.raw.set_index("quantity").loc["params M"]
    assert params["published"] == 45.0
    assert params["ratio"] == pytest.approx(2.11 / 45.0)


def test_published_accuracy_and_memory_are_compared_where_they_can_be() -> None:
    record = changed(
        as_published("ViL", 1),
        {"evaluation.images": 5000, "memory.kind": "allocator", "memory.device": "cuda"},
    )
    table = tables.against_published([record])
    assert table is not None
    assert len(table.raw) == 5
    box = table.raw.set_index("quantity").loc["box mAP %"]
    assert box["difference"] == pytest.approx(box["measured"] - 42.9)
    notes = " ".join(table.notes)
    assert "Drop path differs" in notes
    assert "320 steps of 8 images from no pretrained weights" in notes
    assert "started from a classifier of ImageNet-1K." in notes


def test_published_rows_of_the_zoo_and_of_searches_are_compared() -> None:
    row = "ViL-Small RetinaNet 3x"
    known = load.published().set_index("row").loc[row]
    record = changed(
        make(f"{row} (drop_path=0.2)"),
        {
            "model.arch": known["arch"],
            "model.method": "retinanet",
            "model.schedule": "3x",
            "model.drop_path": 0.2,
            "evaluation.images": 5000,
            "evaluation.mask": None,
            "config.train.init": "vil.pth",
        },
    )
    table = tables.against_published([record])
    assert table is not None
    assert table.raw["quantity"].tolist() == ["box mAP %", "params M", "FLOPs G"]
    assert table.raw["published"].tolist() == [45.9, 35.68, 254.8]
    notes = " ".join(table.notes)
    assert "Drop path differs" not in notes
    assert "from vil.pth" in notes
    assert "absolute positions (a1)" in notes


def test_every_mechanism_looks_different_and_published_ones_never_change() -> None:
    few = plots.looks(["full"])
    many = plots.looks(["full", *(f"mechanism {number}" for number in range(40))])
    assert len({(look.colour, look.marker) for look in many.values()}) == len(many)
    for family in load.published()["attention"].unique():
        assert few[family] == many[family]


def drawn(records: list[Record], cost: str = "flops") -> Axes:
    """The axes of box mAP against a cost."""
    library = load.Library(records, load.frame(records))
    style = plots.looks(list(library.data["family"]))
    figure = plots.accuracy(library, style, front.costs(library.data)[cost])
    assert not isinstance(figure, str)
    return figure.axes[0]


@pytest.mark.parametrize("cost", ["flops", "latency"])
def test_labels_of_near_points_do_not_overlap(cost: str) -> None:
    near = [make(row, number) for number, row in enumerate([*ROWS, "swin", "focused", "a", "b"])]
    near = [
        changed(record, {"evaluation.box.AP": 20 + 0.3 * np.sin(number)})
        for number, record in enumerate(near)
    ]
    ax = drawn(near, cost)
    boxes = [text.get_window_extent() for text in ax.texts]
    names = [text.get_text() for text in ax.figure.legends[0].get_texts()]
    assert len(boxes) == len(names) == 16
    # The highest is the first, in the plot and in its legend.
    assert [name.split(" ")[0] for name in names] == [text.get_text() for text in ax.texts]
    for i, one in enumerate(boxes):
        assert not any(one.shrunk(0.98, 0.9).overlaps(other) for other in boxes[i + 1 :])
        assert ax.bbox.x0 <= one.x0 < one.x1 <= ax.bbox.x1 + 1


def test_a_plot_without_numbers_is_skipped_with_a_sentence(tmp_path: Path) -> None:
    nothing = [failed("ViL", 1, parameters=None, flops=None)]
    drawn = plots.draw(nothing)
    assert all(plot.skipped.endswith(".") for plot in drawn)
    text = page.write(nothing, tmp_path, title="Nothing").read_text()
    assert not (tmp_path / "plots").exists()
    for plot in drawn:
        assert plot.skipped in text


def test_the_page_of_a_profile_begins_with_it_and_says_nothing_of_training(tmp_path: Path) -> None:
    bare = replace(make("ViL"), training=None, evaluation=None)
    cell = pd.DataFrame({"row": ["ViL"]})
    costs = Table("costs", "Costs of ViL", cell, cell, ())
    text = page.write([bare], tmp_path, title="Profile", profiled=[costs]).read_text()
    assert text.index("## Profile") < text.index(costs.title) < text.index("## Comparison")
    assert "1 row, of which 0 failed." in text
    assert (tmp_path / "plots" / "cost.png").is_file()
    for absent in ("trained with", "No row has", "COCO figures"):
        assert absent not in text


def test_the_page_of_classifiers_says_of_what_images_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make("ViL")
    found = {"split": "val", "images": 1000, "box": None, "top1": 71.23, "top5": 90.1}
    found["top1_interval"] = {"top1": [69.8, 72.6]}
    classifier = replace(one, model={**one.model, "method": "classifier"}, evaluation=found)
    assert page.write_suite([classifier], tmp_path, title="Suite pretrain") == 0
    text = (tmp_path / "index.md").read_text()
    assert "Top-1 and top-5 are of 1000 images of val (generated)" in text
    assert "image of 128\N{MULTIPLICATION SIGN}160." in text
    for part in ("plots/loss.png", "Where it ran", "Run it again"):
        assert part in text
    assert "box" not in text
    assert "71.2" in capsys.readouterr().out


def pretrained(row: str, top1: float, val: str, train: str = "a") -> Record:
    """A classifier of images that have these hashes."""
    one = make(row)
    interval = {"level": 0.95, "top1": [top1 - 9, top1]}
    place = {"inputs": {"data": {"train": {"pixels": train}, "val": {"pixels": val}}}}
    evaluation = {"split": "val", "images": 100, "annotations_sha256": val, "box": None}
    return replace(
        one,
        model={**one.model, "method": "classifier"},
        config={**one.config, "data": {"path": "pictures", "train_split": "train"}},
        environment={**one.environment, **place},
        evaluation={**evaluation, "top1": top1, "top5": 100.0, "top1_interval": interval},
    )


def test_classifiers_on_other_images_share_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their labels were mended between the two."""
    rows = [pretrained("ViL", 90.0, "1" * 64), pretrained("full", 80.0, "2" * 64)]
    assert page.write_suite([*rows, pretrained("swin", 70.0, "1" * 64)], tmp_path, title="") == 0
    found = [
        pd.read_csv(tmp_path / "tables" / f"classifiers-val-of-100-images-{val * 8}.csv")
        for val in "12"
    ]
    assert [one["row"].tolist() for one in found] == [["ViL", "swin"], ["full"]]
    text = (tmp_path / "index.md").read_text()
    for said in (text, capsys.readouterr().out):
        for val in "12":
            assert f"Pretrained classifiers, val of 100 images ({val * 8})" in said
    assert len(list((tmp_path / "plots").glob("loss-*.png"))) == 2
    assert f"{'2' * 64} (full)" in text


def test_classifiers_of_other_training_images_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pretrained(row, 90.0, "1", train) for row, train in (("ViL", "a"), ("full", "b"))]
    page.write_suite(rows, tmp_path, title="Suite pretrain")
    text = (tmp_path / "index.md").read_text()
    for said in (text, capsys.readouterr().out):
        assert "the rows with the same training data, which differs" in said
    assert "a (ViL); b (full)" in text


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    losses = [{"step": step, "total": None if step > 20 else 2.0} for step in (10, 20, 30)]
    training = {"steps": 30, "seconds": 3.0, "losses": losses}
    assert not plots.draw([make("ViL", training=training)])[-1].skipped


def test_page_holds_everything_and_is_the_same_each_time(
    records: list[Record], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    index = page.write(records, first, title="Quick suite")
    assert index == first / "index.md"
    page.write(records, second, title="Quick suite")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    text = index.read_text()
    for name in ("ranks", "accuracy_flops", "accuracy_memory", "accuracy_latency", "cost", "loss"):
        assert f"(plots/{name}.png)" in text
        assert (first / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (first / "plots" / f"{name}.svg").read_text()
    for stem in ("comparison", "coco_figures", "details"):
        assert {path.suffix for path in first.glob(f"tables/{stem}.*")} == {".csv", ".md", ".tex"}
    for words in ("tried to allocate 12 GB", "python run_all.py", "not comparable with published"):
        assert words in text
    # The traceback has a fence of its own, so the page's must be longer.
    assert "\n````\n" in text


def test_a_row_that_is_not_drawn_is_named_under_the_plot(
    records: list[Record], tmp_path: Path
) -> None:
    notes = {plot.name: plot.note for plot in plots.draw(records)}
    assert "full (failed: out of memory)" in notes["accuracy_flops"]
    assert notes["cost"] == ""
    text = page.write(records, tmp_path, title="Suite").read_text()
    assert text.count(notes["accuracy_flops"]) == 3
    assert not plots.draw(records[:9])[1].note


def test_a_small_difference_is_not_drawn_over_the_whole_height() -> None:
    pair = [changed(make(row), {"evaluation.box.AP": ap}) for row, ap in (("a", 20), ("b", 20.01))]
    low, high = drawn(pair).get_ylim()
    assert high - low >= plots.LEAST_AP


def test_each_file_of_a_table_says_where_its_numbers_come_from(
    records: list[Record], tmp_path: Path
) -> None:
    text = page.write(records, tmp_path, title="Suite").read_text()
    facts = ("2025-01-02", "torchvision 0.26.0", "torch 2.11.0", "A processor of 2 cores",
             "32-true", "seed 0", "commit 0123456789.")  # fmt: skip
    for path in [*tmp_path.glob("tables/*.md"), *tmp_path.glob("tables/*.tex")]:
        for fact in facts:
            assert fact in path.read_text()
    assert all(fact in text.splitlines()[2] for fact in facts)
    line = pd.read_csv(tmp_path / "tables" / "comparison.csv").iloc[0]
    assert line["commit"].startswith("0123456789")
    assert (line["seeds"], line["device"], line["precision"]) == (0, "cpu", "32-true")


def test_provenance_lists_what_differs() -> None:
    first = make("ViL")
    places = {"dirty": True, "device": "A GPU", "commit": None}
    other = changed(
        make("full", 1, seed=3, created="2025-02-01T00:00:00+00:00"),
        {f"environment.{name}": value for name, value in places.items()},
    )
    said = provenance.sentence([first, other])
    assert "from 2025-01-02 to 2025-02-01" in said
    assert "A GPU (A processor of 2 cores, 2 cores)" in said
    assert "seed 0, 3" in said
    assert "commit 0123456789, unknown." in said
    dirty = changed(first, {"environment.dirty": True})
    assert "0123456789 with changes" in provenance.sentence([dirty])


def test_latex_is_ascii_for_any_engine_and_font() -> None:
    shown = pd.DataFrame(
        {"at 8\N{MULTIPLICATION SIGN}8": ["1 ± 2", MISSING, f"{AT_LEAST} 3", "a<b>~^"]}
    )
    latex = tables.to_latex(shown, caption=f"± {MISSING} \N{MULTIPLICATION SIGN}")
    assert latex.isascii()
    for one in (r"at 8$\times$8", r"1 $\pm$ 2", r"$\geq$ 3", r"a\textless{}b\textgreater{}"):
        assert one in latex


def test_plots_are_the_same_whatever_a_user_s_settings_are() -> None:
    def draw() -> Figure:
        figure = Figure()
        figure.add_subplot().set_title("5 % of a_b")
        return figure

    before = plots.render("a", "a", draw)
    with mpl.rc_context({"axes.facecolor": "red", "text.usetex": True, "lines.linewidth": 9}):
        after = plots.render("a", "a", draw)
        assert mpl.rcParams["text.usetex"]
    assert (after.png, after.svg) == (before.png, before.svg)


def test_latex_keeps_two_hyphens_and_wraps_long_texts() -> None:
    cells = {"short": "a", "long": "--what " * 12, "word": "a" * 90, "n": "1.0"}
    text = tables.to_latex(pd.DataFrame([cells]))
    assert "-{}-what -{}-what" in text
    assert r"\begin{tabular}{lp{0.4\textwidth}lr}" in text


def test_latex_with_a_caption_is_a_float_that_escapes_it() -> None:
    (table,) = tables.comparison([make("ViL")])
    text = tables.to_latex(table.shown, caption="5 % of a_b & {c}\\d", label="tab")
    assert r"\caption{5 \% of a\_b \& \{c\}\textbackslash{}d}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 3
    assert r"\label{tab:tab}" in text


def test_a_failure_says_why_before_its_traceback(tmp_path: Path) -> None:
    text = page.write([failed("ViL")], tmp_path, title="Suite").read_text()
    assert "ViL failed, out of memory: tried to allocate 12 GB" in text


def test_html_needs_no_other_file_and_escapes_messages(
    records: list[Record], tmp_path: Path
) -> None:
    page.write([*records, make("a|b <i> & 5_%", 12)], tmp_path, title="A <title>")
    text = (tmp_path / "index.html").read_text()
    assert "<title>A &lt;title&gt;</title>" in text
    assert "&lt;12 GB&gt;" in text
    assert '<td class="text">a|b &lt;i&gt; &amp; 5_%' in text
    assert '<th class="number">box mAP %</th>' in text
    assert text.count('src="data:image/png;base64,') == text.count("<img ") == 6
    assert "http" not in text


def test_page_is_written_over_an_older_one(records: list[Record], tmp_path: Path) -> None:
    page.write(records[:2], tmp_path, title="Old")
    page.write(records, tmp_path, title="New")
    assert "# New" in (tmp_path / "index.md").read_text()
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_table_or_plot_of_an_earlier_page_stays(records: list[Record], tmp_path: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    once, twice = tmp_path / "once", tmp_path / "twice"
    page.write(records, twice, title="Old")
    own = {"tables/differences-mine.csv", "tables/mine.md", "plots/mine.png", "plots/loss.txt"}
    for name in own:
        (twice / name).write_text("a file of the user")
    for folder in (once, twice):
        page.write([make("ViL", training=None)], folder, title="New")
    assert files(twice) == files(once) | own
    assert "tables/fronts.csv" not in files(twice)
    assert "plots/loss.png" not in files(twice)


def test_page_says_why_it_cannot_be_written(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        page.write([], tmp_path, title="Empty")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot write the report"):
        page.write(records[:1], blocked, title="Blocked")


def test_further_splits_have_a_table_of_their_own(records: list[Record]) -> None:
    first, *others = records
    assert tables.further_splits(records) is None
    seen = {"split": "train2017", "images": 33, "box": first.evaluation["box"], "mask": None}
    both = [changed(first, {"evaluation.also": [seen]}), *others]
    table = tables.further_splits(both)
    assert table is not None
    assert table.shown[["row", "split", "of"]].values.tolist() == [
        [f"{first.row} (torchvision)", "train2017", "box"]
    ]


@pytest.mark.parametrize(
    ("unsummed", "mode", "said"),
    [
        (9_999, None, None),
        (10_000, None, "10,000 (1.0%)"),
        (3_333, "training", None),
        (3_334, "training", "3,334 (0.3%)"),
        (None, None, None),
    ],
)
def test_products_in_no_sum_are_said_under_a_table(
    unsummed: int | None, mode: str | None, said: str | None
) -> None:
    counted = {"flops.total": 1_000_000, "flops.unsummed": unsummed, "flops.mode": mode}
    (table,) = tables.comparison([changed(make("performer"), counted)])
    assert ("performer: 10,000 (1.0%)" in " ".join(table.notes)) == (said == "10,000 (1.0%)")
    assert load.unsummed({"total": 1_000_000, "unsummed": unsummed, "mode": mode}) == said
    assert not table.shown["FLOPs G"][0].startswith("≥")


def test_flops_that_lack_operators_are_marked_and_named_and_decide_nothing() -> None:
    lacking = changed(
        make("performer"), {"flops.total": 1, "flops.uncounted": {"aten._fft_r2c": 3}}
    )
    (table,) = tables.comparison([make("ViL"), lacking])
    shown = table.shown.set_index("row")["FLOPs G"]
    assert shown["performer"].startswith("≥ ")
    assert not shown["ViL"].startswith("≥")
    assert "performer: aten._fft_r2c (3)" in " ".join(table.notes)
    assert table.raw["flops_uncounted"].fillna("").tolist() == ["", "aten._fft_r2c (3)"]
    rows = [make("ViL"), lacking]
    library = load.Library(rows, load.frame(rows))
    assert [place.row for place in front.places(library, "flops")] == [0]
