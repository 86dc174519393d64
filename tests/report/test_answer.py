"""The first screen and recommendations, over made-up records whose answer is known."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench import record as store
from bench.errors import InputError
from bench.record import Record
from report import answer, export, front, load, page, plots, probes, recommend, reference, tables
from report.columns import MISSING, Unit
from report.recommend import Limit
from tests.records import changed
from tests.report.test_confidence import common, evaluated
from tests.report.test_report import failed

GIGA = 10**9
X = "\N{MULTIPLICATION SIGN}"


def cost(row: str, flops: int | None, memory: int | None, note: str = "") -> Record:
    """What a row costs at 800 by 1344, in units of 10^9."""
    predicted = {mode: {"total": (memory or 0) * GIGA} for mode in ("inference", "training")}
    figure = {"flops": None} if flops is None else {"flops.total": flops * GIGA}
    return changed(
        evaluated(row, common()),
        {
            "suite": "costs",
            "key": f"cost of {row}",
            "config": {
                "row": row,
                "device": "cuda",
                "profile": {"image_size": [800, 1344], "batch_size": 2},
                "train": {"precision": "16-mixed"},
            },
            "memory.predicted": predicted if memory else {},
            "notes": [note] if note else [],
        }
        | figure,
    )


@pytest.fixture
def records() -> list[Record]:
    """ViL and full are alike, performer is worse by five, srformer by ten."""
    shifts = {"ViL": (0.0, 2), "full": (0.3, 3), "performer": (-5.0, 4), "srformer/32": (-10.0, 5)}
    return [evaluated(row, common(s, noise=1.0, seed=n)) for row, (s, n) in shifts.items()]


@pytest.fixture
def costs() -> list[Record]:
    return [
        cost("ViL", 255, 4),
        cost("full", 1410, 4),
        cost("performer", 200, 3),
        cost("srformer/32", 260, None, "memory not predicted: RuntimeError: no luck"),
    ]


def limits(**most: float) -> list[Limit]:
    columns = {"memory": ("memory_training", Unit.GB), "flops": ("flops", Unit.GIGA)}
    return [
        Limit(f"--max-{name} {value:g}", columns[name][0], value * GIGA, columns[name][1])
        for name, value in most.items()
    ]


def test_the_answer_says_what_is_best_what_ties_and_what_is_unknown(
    records: list[Record], costs: list[Record]
) -> None:
    (found,) = answer.first(records, costs)
    assert found.sentences == (
        "full has the highest box mAP, 30.5 ± 6.1 %, which may be chance; of it and the row that"
        f" cannot be told apart from it, ViL needs the fewest FLOPs at 800{X}1344 (255 G) and"
        " memory for training does not decide (4.00 to 4.00 GB, predicted).",
        "Not told apart from full: ViL; told apart as worse: performer and srformer/32; in all, 5"
        " of 6 pairs of rows are told apart by mAP.",
        f"Not measured here: latency at 800{X}1344 (--costs measured times the attention layers),"
        " nor anything else on a GPU of that size; accuracy on photographs (mAP is of 100 generated"
        " images after 320 steps); what another seed changes (--seeds 3); what each row can see"
        " (--suite probes).",
    )
    assert found.table.raw["row"].tolist() == ["ViL", "full", "performer", "srformer/32"]
    assert found.table.shown["rank"].tolist() == ["1", "1", "3", "4"]
    # Of what was not counted the cell is empty, and the table of costs has the reason.
    assert found.table.shown.iloc[3, -1] == MISSING
    (table,) = reference.tables(records, costs)
    assert "srformer/32: memory not predicted: RuntimeError: no luck." in table.notes


def test_the_answer_where_the_memory_of_no_row_is_known(records: list[Record]) -> None:
    (found,) = answer.first(records, [cost(one.row, 255, None) for one in records])
    assert "ViL and full need the fewest FLOPs" in found.sentences[0]
    assert "memory" not in found.sentences[0]


def test_the_answer_without_costs_at_full_size(records: list[Record]) -> None:
    unlike = [records[0], replace(records[2], memory=None, latency=None)]
    (found,) = answer.first(unlike, [])
    assert found.sentences == (
        "ViL has the highest box mAP, 30.2 ± 6.4 %; of all rows, ViL and performer need the fewest"
        f" FLOPs at 128{X}160 (1.44 G), ViL needs the least memory for training (0.49 GB; not known"
        " of performer) and the least time for inference (151 ms, median).",
        "Told apart as worse: performer; in all, 1 of 1 pairs of rows are told apart by mAP.",
        "Not measured here: costs at the size of large images (--costs counted); accuracy on"
        " photographs (mAP is of 100 generated images after 320 steps); what another seed changes"
        " (--seeds 3); what each row can see (--suite probes).",
    )


def test_what_is_not_known_of_a_row_is_said_beside_the_least(records: list[Record]) -> None:
    def said(uncounted: dict[str, int], total: float) -> str:
        other = changed(records[1], {"flops.uncounted": uncounted, "flops.total": total})
        (found,) = answer.first([records[0], other], [])
        return found.sentences[0]

    fft = {"aten._fft_c2c": 5}
    fewest = f"needs the fewest FLOPs at 128{X}160 (1.44 G{{}})"
    assert fewest.format("; not known of full") in said(fft, 1e9)
    # A lower bound that is above it is known to be more.
    assert fewest.format("") in said(fft, 2e9)


def test_few_images_say_little(records: list[Record]) -> None:
    two, one = ([changed(r, {"evaluation.images": n}) for r in records[:2]] for n in (2, 1))
    (found,) = answer.first(two, [])
    assert found.sentences[1].endswith("told apart by mAP; of 2 images, mAP says little.")
    # All draws of one image are alike, in records of before too.
    (found,) = answer.first(one, [])
    assert "±" not in found.sentences[0]
    assert "no two have draws of images" in found.sentences[1]


def test_times_of_several_sessions_do_not_decide(records: list[Record]) -> None:
    timed = [changed(one, {"latency.session": f"of {one.row}"}) for one in records]
    (found,) = answer.first(timed, [])
    assert "in 2 sessions (full in another than most rows)" in found.sentences[0]
    assert "least time" not in found.sentences[0]


def test_times_within_each_others_spread_and_bytes_of_memory_do_not_decide(
    records: list[Record],
) -> None:
    times = ((0.10, 0.09, 0.12), (0.11, 0.10, 0.13), (0.20, 0.19, 0.21))
    timed = [
        changed(
            one,
            {
                "memory.training": 490_000_000 + 128 * place,
                "latency.inference": dict(zip(("median", "q1", "q3"), three, strict=True)),
            },
        )
        for place, (one, three) in enumerate(zip((*records[:2], records[1]), times, strict=True))
    ]
    (found,) = answer.first(timed[:2], [])
    assert "memory for training does not decide (0.49 to 0.49 GB)" in found.sentences[0]
    assert "time for inference does not decide (100 to 110 ms)" in found.sentences[0]
    (found,) = answer.first([timed[0], timed[2]], [])
    assert "ViL needs the least time for inference (100 ms, median)" in found.sentences[0]


def test_rows_of_another_commit_are_named(records: list[Record], costs: list[Record]) -> None:
    def made(*commits: str | None, dirty: int = 0) -> list[Record]:
        return [
            changed(one, {"environment.commit": commit, "environment.dirty": place < dirty})
            for place, (one, commit) in enumerate(zip(records, commits, strict=True))
        ]

    def said(found: list[Record], costs: list[Record]) -> list[str]:
        shown = [answer.first(found, costs)[0].table, *tables.comparison(found)]
        return [note for one in shown for note in one.notes if "another commit" in note]

    note = (
        "Made with another commit of this package than most rows, which may be why memory or mAP"
        f" differs: {records[1].row}."
    )
    assert said(made("a", "b", "a", "a"), costs) == [note, note]
    assert said(made(None, "b", "a", "a"), []) == [note, note]
    assert said(made("a", "a", "a", "a", dirty=1), [])[0].endswith(f": {records[0].row}.")
    assert said(made(None, None, "a", "a"), costs) == []


def test_no_row_is_left_out_that_is_quicker_than_one_that_is_named(records: list[Record]) -> None:
    # The third reaches as low as the first, whose times spread less; the second does not.
    times = ((0.108, 0.1, 0.12), (0.138, 0.13, 0.14), (0.14, 0.11, 0.16), (0.2, 0.19, 0.21))
    memory = (400, 401, 500, 600)
    timed = [
        changed(
            one,
            {
                "memory.training": megabytes * 10**6,
                "latency.inference": dict(zip(("median", "q1", "q3"), three, strict=True)),
            },
        )
        for one, three, megabytes in zip(records, times, memory, strict=True)
    ]
    standing = answer.Standing(load.Library(timed, load.frame(timed)), None)
    assert standing.cheapest(range(4)).endswith(
        "ViL and full need the least memory for training (0.40 GB) and ViL, full and performer need"
        " the least time for inference (108 to 140 ms, median)"
    )


def test_the_answer_of_rows_that_cannot_be_told_apart_or_failed() -> None:
    alike = [evaluated(row, common(0.0, noise=1.0, seed=9)) for row in "abcdefgh"]
    best, same, _ = answer.first(alike, [])[0].sentences
    assert "of it and the 7 rows that cannot be told apart from it, a, b, c, d, e, f and 2" in best
    assert same == (
        "Not told apart from a: b, c, d, e, f, g and h; in all, 0 of 28 pairs of rows are told"
        " apart by mAP."
    )
    cheaper = replace(failed("cheap"), flops={**(failed("cheap").flops or {}), "total": 1})
    assert "cheap needs" not in answer.first([*alike, cheaper], [])[0].sentences[0]
    (found,) = answer.first([failed("full"), failed("ViL")], [])
    assert found.sentences == (
        f"No row was evaluated, so none is best; full and ViL need the fewest FLOPs at 128{X}160"
        " (1.44 G).",
        "Which rows could be told apart is not known: no two have draws of images.",
        "Not measured here: costs at the size of large images (--costs counted); what each row can"
        " see (--suite probes); full (out of memory); ViL (out of memory).",
    )


def test_costs_at_the_size_of_training_stand_beside_under_their_name(
    records: list[Record], costs: list[Record], tmp_path: Path
) -> None:
    (table,) = reference.tables(records, costs)
    assert table.title == f"Costs at 800{X}1344"
    assert table.raw["flops_multiply_adds"].tolist()[0] == 255 * GIGA
    small = records[0].flops or {}
    assert table.raw["flops_as_trained"].tolist()[0] == small["total"]
    assert f"FLOPs G at 128{X}160, as in the comparison" in table.shown
    text = page.write(records, tmp_path, title="T", costs=costs).read_text()
    assert f"Comparison, costs at 128{X}160" in text
    assert text.index("## Answer") < text.index("## Costs at 800") < text.index("## Comparison")


@pytest.mark.parametrize("name", ["accuracy", "ranks", "costs", "losses"])
def test_plots_are_legible_in_the_column_of_a_paper(
    name: str, records: list[Record], costs: list[Record]
) -> None:
    full = reference.at_reference(records, costs)
    library = load.Library(full, load.frame(full))
    style = plots.looks(list(library.data["family"]))
    of = {
        "accuracy": lambda: plots.accuracy(library, style, front.costs(library.data)["memory"]),
        "ranks": lambda: plots.ranks(library, style),
        "costs": lambda: plots.costs(library.data, style),
        "losses": lambda: plots.losses(library, style),
    }
    figures: list[Figure] = []

    def keep() -> Figure:
        figure = of[name]()
        assert isinstance(figure, Figure)
        figures.append(figure)
        return figure

    assert plots.render(name, name, keep).png
    texts = [one for one in figures[0].findobj(Text) if isinstance(one, Text) and one.get_text()]
    column = 85 / 25.4
    assert min(one.get_fontsize() for one in texts) * column / figures[0].get_figwidth() > 5
    headings = {ax.get_title(loc="left") for ax in figures[0].axes}
    boxes = [one.get_window_extent() for one in texts if one.get_text() in headings]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_loss_of_one_step_is_seen(records: list[Record]) -> None:
    first = records[0]
    assert first.training is not None
    for losses, marker in ((first.training["losses"][:1], "o"), (first.training["losses"], "")):
        one = replace(first, training={**first.training, "losses": losses})
        library = load.Library([one], load.frame([one]))
        figure = plots.losses(library, plots.looks(list(library.data["family"])))
        assert isinstance(figure, Figure)
        assert figure.axes[0].lines[-1].get_marker() == marker


def test_what_rows_see_stands_before_their_accuracy(
    records: list[Record], costs: list[Record]
) -> None:
    scores = pd.DataFrame({"bind": {"ViL": 0.91, "full": 1.0}})
    pair = frozenset({"ViL", "full"})
    sees = probes.Profile(scores, frozenset({pair}), seeds=1, about="What bind asks.")
    (found,) = answer.first(records, costs, sees)
    assert found.table.shown.columns[:3].tolist() == ["row", "bind", "box mAP %"]
    assert found.table.shown["bind"].tolist() == ["0.91", "1.00", MISSING, MISSING]
    assert "--suite probes" not in found.sentences[2]
    # ViL and full are the pair that mAP does not tell apart.
    said = found.sentences[1]
    assert said.endswith(
        "5 of 6 pairs of rows are told apart by mAP, 6 by mAP or a probe (of one seed)."
    )
    best = "the best of them for their FLOPs by the mean over probes are"
    assert found.sentences[0].endswith(f"; {best} ViL (0.91 at 255 G) and full (1.00 at 1,410 G).")
    assert found.table.notes[-1] == "What bind asks."
    # A higher score that is not told apart is not worth more FLOPs.
    (found,) = answer.first(records, costs, replace(sees, apart=frozenset()))
    assert best not in found.sentences[0]


def test_the_size_of_costs_and_the_most_memory_stand_on_the_first_screen(
    records: list[Record],
) -> None:
    memory = zip(("ViL", "full", "performer", "srformer/32"), (4, 6, 3, 7), strict=True)
    (found,) = answer.first(records, [cost(row, 255, most) for row, most in memory])
    assert "(4.00 GB, predicted; the most of any row is 7.00 GB)" in found.sentences[0]
    assert f"images of 800{X}1344 (as many pixels as 1037{X}1037), batch 2" in found.table.notes[0]


def test_measured_layers_stand_beside_the_costs_with_their_machine(
    records: list[Record], costs: list[Record]
) -> None:
    one = cost("ViL", 0, None)
    names = [f"stage{n}" for n, _ in enumerate(one.model["arch"].split("_"))]
    stages = {name: {"median": 1, "q1": 1, "q3": 4, "layers": 20 / len(names)} for name in names}
    measured = changed(
        replace(one, environment={"cpu": "EPYC", "cores": 2, "device": "cpu"}),
        {
            "config.layers": {"name": "cpu"},
            "memory.by_part": {"inference": {"stage1": 7 * 10**6, "stage2": 3 * 10**6}},
            "latency.by_part": {"inference": stages},
            "latency.precision": "32-true",
            "latency.batch_size": 2,
            "latency.notes": ["stage1: inference: still changing after 2 warm-up calls"],
        },
    )
    (found,) = answer.first(records[:2], [*costs, measured])
    where = (
        "Attention layers were measured on EPYC, 2 cores (inference, precision 32-true, batch 2):"
        " their time is the median of one layer of each stage, times its layers, their memory the"
        " largest peak of one layer. Some of the times are uncertain (still changing); see the"
        " records."
    )
    assert where in found.table.notes[0]
    assert f"latency of whole models at 800{X}1344" in found.sentences[2]
    assert "and ViL needs the least time in attention layers (20,000 ms" in found.sentences[0]
    (table,) = reference.tables(records[:2], [*costs, measured])
    assert where in table.notes
    assert table.shown["attention layers ms (measured)"].tolist() == ["20,000", MISSING]
    assert table.shown["largest attention layer MB (measured)"].tolist() == ["7.00", MISSING]


def test_a_search_and_a_row_without_costs(records: list[Record], costs: list[Record]) -> None:
    config: dict[str, Any] = {**records[0].config, "model": {"drop_path": 0.1}}
    searched = store.Record(**vars(records[0]) | {"row": "ViL (drop_path=0.1)", "config": config})
    own, none = reference.at_reference([searched, records[1]], costs[:1])
    assert (own.flops or {})["total"] == 255 * GIGA
    assert none.flops is None


def test_costs_say_where_blocks_are_computed_again(
    records: list[Record], costs: list[Record]
) -> None:
    def stated(again: dict[str, bool]) -> str:
        known = [
            changed(one, {"config.model": {"checkpoint": again.get(one.row, False)}})
            for one in costs
        ]
        about = reference.conditions(known)
        assert about is not None
        (found,), (table,) = answer.first(records, known), reference.tables(records, known)
        (advised,) = recommend.recommend(records, known, [], mode="training")
        assert found.table.notes[0].startswith(f"Costs are of {about.sentence}.")
        assert advised.table.notes[0].startswith(f"Costs are of {about.sentence}.")
        assert table.notes[0].startswith(about.sentence)
        return about.sentence.partition("mixed precision (fp16) on one GPU")[2]

    names = [one.row for one in costs]
    assert stated({}) == ""
    everywhere = ", blocks computed again in the backward pass"
    assert stated(dict.fromkeys(names, True)) == everywhere
    some = ", blocks of ViL, full computed again in the backward pass"
    assert stated({"ViL": True, "full": True}) == some


def test_costs_with_blocks_computed_again_are_of_such_rows_alone(records: list[Record]) -> None:
    def of(record: Record, *, again: bool) -> Record:
        return changed(record, {"config.model": {"checkpoint": again}})

    every = [of(cost("ViL", 200, 4), again=False), of(cost("ViL", 255, 2), again=True)]
    for again, flops in ((False, 200), (True, 255)):
        (own,) = reference.at_reference([of(records[0], again=again)], every)
        assert (own.flops or {})["total"] == flops * GIGA
    (none,) = reference.at_reference([of(records[0], again=False)], every[1:])
    assert none.flops is None


def test_costs_are_of_the_same_model(records: list[Record]) -> None:
    arch = "l1,h{0},d{0},n{0},s1,g1,p{0},f7,a1"

    def of(record: Record, method: str, backbone: str, width: int, **model: Any) -> Record:
        known = {"attention": "longformer", "options": {}, "arch": arch.format(width)}
        parts = {"config.model": known | model, "model.method": method, "model.backbone": backbone}
        return changed(record, parts)

    seven = of(records[0], "mask_rcnn", "ViL-Quick", 2)
    five = of(records[0], "mask_rcnn", "ViL-Quick", 2, options={"window": 5})
    retina = of(records[0], "retinanet", "ViL-Quick", 2)
    wide = of(records[0], "mask_rcnn", "ViL-Small", 4, detector={"fpn_channels": 32})
    known = [of(cost("ViL", 255, 4), "mask_rcnn", "ViL-Small", 4, detector={})]
    known += [of(cost("ViL", 254, 4), "retinanet", "ViL-Small", 4, detector={})]
    found = reference.at_reference([seven, five, retina, wide], known)
    assert [load.at(one, "flops.total") for one in found] == [255 * GIGA, None, 254 * GIGA, None]


def test_limits_choose_rows_and_say_what_they_cost(
    records: list[Record], costs: list[Record]
) -> None:
    (found,) = recommend.recommend(records, costs, limits(memory=16, flops=250), mode="training")
    assert found.table.raw["row"].tolist() == ["performer"]
    text = " ".join(found.sentences)
    assert "--max-memory 16 keeps out no row whose cost is known." in text
    assert "--max-flops 250 keeps out ViL and full; it costs 5." in text
    assert "told apart)" in text
    assert "not considered, as its cost is not known: srformer/32" in text.lower()
    (free,) = recommend.recommend(records, costs, [], mode="training")
    assert any("To tell full from the rows that tie with it" in one for one in free.sentences)
    assert free.sentences[1].endswith("Until then choose by cost.")
    scores = pd.DataFrame({"bind": {"ViL": 0.9, "full": 1.0, "performer": 0.5}})
    sees = probes.Profile(scores, frozenset({frozenset({"ViL", "full"})}), seeds=1)
    (seen,) = recommend.recommend(records, costs, [], mode="training", sees=sees)
    assert "by the mean over probes are ViL (0.90 at 255 G) and full" in seen.sentences[0]
    assert seen.table.shown["bind"].tolist() == ["0.90", "1.00", "0.50", MISSING]


def test_limits_that_nothing_meets_name_the_nearest(
    records: list[Record], costs: list[Record]
) -> None:
    with pytest.raises(InputError, match=r"nearest is performer \(3 GB memory, 200 G FLOPs"):
        recommend.recommend(records, costs, limits(memory=2, flops=190), mode="training")
    # Whether a lower bound meets a limit is not known, unless it is above it.
    costs[0] = changed(costs[0], {"flops.uncounted": {"aten._fft_c2c": 1}})
    (found,) = recommend.recommend(records, costs, limits(flops=300), mode="training")
    assert (
        "Not considered, as its FLOPs are incomplete and may be above --max-flops 300: ViL (at"
        " least 255 G, without aten._fft_c2c (1))."
    ) in found.sentences
    assert not any("keeps out" in one and "ViL" in one for one in found.sentences)
    assert not any("costs nothing" in one for one in found.sentences)
    (found,) = recommend.recommend(records, costs, limits(flops=201), mode="training")
    assert any("keeps out" in one and "ViL" in one for one in found.sentences)
    # What it needs is a limit that it meets, as it is copied from there.
    costs[2] = changed(costs[2], {"flops.total": 186_673_412_345})
    with pytest.raises(InputError, match=r"nearest is performer \(186.674 G FLOPs"):
        recommend.recommend(records, costs, limits(flops=186.673), mode="training")
    # A lower bound that meets it is no row that is nearest.
    costs[0] = changed(costs[0], {"flops.total": 186_000_000_000})
    with pytest.raises(InputError, match=r"nearest is performer"):
        recommend.recommend(records, costs, limits(flops=186.673), mode="training")
    (found,) = recommend.recommend(records, costs, limits(flops=186.674), mode="training")
    assert found.sentences[0].startswith("performer has the highest box mAP")


def test_all_numbers_are_in_one_tidy_file(records: list[Record], tmp_path: Path) -> None:
    page.write([*records, failed("linformer")], tmp_path, title="T")
    data = pd.read_parquet(tmp_path / export.NAME)
    one = data[(data["row"] == "ViL") & (data["figure"] == "box.AP")].iloc[0]
    assert [one["section"], one["unit"]] == ["evaluation", "percent"]
    assert one["value"] == (records[0].evaluation or {})["box"]["AP"]
    flops = data[(data["section"] == "flops") & (data["figure"] == "total")]
    assert flops["image_size"].tolist() == [f"128{X}160"] * 5
    assert set(data["row"]) == {"ViL", "full", "performer", "srformer/32", "linformer"}
    assert not data.duplicated(["row", "key", "section", "figure"]).any()
    units = dict(data[["figure", "unit"]].values)
    assert [units[name] for name in ("images", "box.AP", "seconds")] == ["1", "percent", "s"]
    assert {unit for name, unit in units.items() if name.startswith("box_interval")} <= {"1"}


def test_costs_are_those_of_the_size_that_was_counted_last(tmp_path: Path) -> None:
    for day, height in ((1, 800), (2, 224), (0, 512)):
        profile = {"image_size": [height, 224], "batch_size": 2}
        one = cost("ViL", 255, 4)
        created = f"2026-01-0{1 + day}T00:00:00+00:00"
        one = replace(changed(one, {"config.profile": profile}), key=f"{height}", created=created)
        store.write(one, tmp_path / store.COSTS)
    (found,) = reference.load(tmp_path)
    assert found.config["profile"]["image_size"] == [224, 224]
