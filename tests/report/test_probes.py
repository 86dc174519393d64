from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bench import record as store
from report import export, page, probes
from report.load import published
from tests.records import MODEL, plain
from tests.report.test_report import make


def accuracies(mean, *, seeds=3, images=64, spread=0.01, seed=0):
    draw = np.random.default_rng(seed)
    return np.clip(mean + spread * draw.standard_normal((seeds, images)), 0, 1)


def entry(name, kind, scores, seeds=3):
    draw = np.random.default_rng(len(name))
    tasks = {
        task: {
            "asks": "capacity",
            "about": "Keys.",
            "level": "keys",
            "levels": [1, 2],
            "asked": [[100] * 8] * 2,
            "right": np.clip(np.rint(100 * score + draw.normal(0, 1, (seeds, 2, 8))), 0, 100)
            .astype(int)
            .tolist(),
            "losses": [[1.0]] * seeds,
            "seconds": [1.0] * seeds,
        }
        for task, score in scores.items()
    }
    return plain(
        suite="probes",
        row=name,
        key=name + kind,
        created="2026-01-01T00:00:00+00:00",
        config={"kind": kind},
        environment={"packages": {}},
        model={**dict.fromkeys(MODEL, "none"), "drop_path": 0.0},
        probes={"kind": kind, "seeds": [0, 1, 2][:seeds], "chance": 0.25, "tasks": tasks},
    )


def test_what_differs_far_beyond_its_spread_has_other_letters():
    found = probes.letters(
        {
            "low": accuracies(0.3, seed=1),
            "best": accuracies(0.95, seed=2),
            "as good": accuracies(0.951, seed=3),
            "middle": accuracies(0.6, seed=4),
        }
    )
    assert found == {"best": "a", "as good": "a", "middle": "b", "low": "c"}


def test_what_lies_between_two_that_differ_shares_a_letter_with_both():
    noise = np.array([-0.05, 0.0, 0.05])[:, None] * np.ones((3, 64))
    found = probes.letters(
        {name: mean + noise for name, mean in (("a", 0.9), ("between", 0.8), ("c", 0.7))}
    )
    assert found == {"a": "a", "between": "ab", "c": "b"}


@pytest.mark.parametrize("seeds", [(0.3, 0.6, 0.9), (0.6, 0.65, 0.7)])
def test_a_mechanism_that_varies_much_over_seeds_is_not_told_apart_by_its_mean(seeds):
    steady = {str(n): accuracies(0.5, spread=0.001, seed=n) for n in range(6)}
    wild = np.array(seeds)[:, None] * np.ones((3, 64))
    found = probes.letters({**steady, "wild": wild})
    assert set(found["wild"]) & set(found["0"])


def test_equal_mechanisms_are_seldom_told_apart():
    wrong = 0
    for trial in range(60):
        draw = np.random.default_rng(trial)
        ours = {
            str(n): 0.5 + 0.02 * draw.standard_normal((3, 1)) + 0.02 * draw.standard_normal((3, 64))
            for n in range(8)
        }
        wrong += len(set(probes.letters(ours).values())) > 1
    assert wrong <= 7


def rows(order):
    ablation = published()[lambda data: data["table"] == "ablation"]
    ranks = dict(zip(ablation["row"], ablation["box_map"].rank(), strict=True))
    return [entry(row, "row", {"bindup": 0.3 + 0.05 * order(rank)}) for row, rank in ranks.items()]


@pytest.mark.parametrize("sign", [1, -1])
def test_agreement_with_published_map_is_beside_that_of_the_rule(sign):
    table = probes.agreement(rows(lambda rank: rank if sign > 0 else 10 - rank))[0].raw
    found = table.set_index("score")
    assert found.loc["bindup", "correlation"] == pytest.approx(sign, abs=0.05)
    assert (found.loc["bindup", "p"] < 0.001) == (sign > 0)
    assert found.loc["rule: Partial or ViL", "correlation"] == pytest.approx(0.87, abs=0.005)
    assert probes.agreement(rows(lambda rank: rank)[:4]) == []


def test_the_page_shows_probes_alone_and_says_that_they_predict_nothing(tmp_path):
    records = [
        entry("full", "mechanism", {"bind": 0.99, "majority": 0.99}),
        entry("global", "mechanism", {"bind": 0.4, "majority": 0.99}),
        *rows(lambda rank: rank),
    ]
    text = page.write([], tmp_path, title="Probes", probes=records).read_text()
    assert "does not predict COCO" in " ".join(text.split())
    assert (tmp_path / "plots" / "probes_mechanism.png").stat().st_size > 0
    shown = probes.tables(records)[0].shown.set_index("mechanism")
    assert shown.loc["full", "bind"].endswith(" a")
    assert shown.loc["global", "bind"].endswith(" b")
    assert shown.loc["global", "majority"].endswith(" a")
    seen = probes.profile(records)
    assert seen.scores.loc["Partial ViL", "bindup"] == pytest.approx(0.75, abs=0.01)
    assert probes.profile(records[:2]) is None


def test_a_pair_of_rows_is_told_apart_where_one_probe_tells_it():
    alike, better = {"bindup": 0.5, "regions": 0.5}, {"bindup": 0.5, "regions": 0.9}
    scores = {"ViL": alike, "full": better, "swin": alike}
    found = probes.profile([entry(name, "row", each) for name, each in scores.items()])
    assert found.apart == {frozenset({"ViL", "full"}), frozenset({"full", "swin"})}
    assert found.seeds == 3


def test_what_failed_is_named_and_the_newest_of_a_name_counts():
    old, new = (
        replace(entry("full", "mechanism", {"bind": score}), created=f"2026-01-0{day}")
        for score, day in ((0.4, 1), (0.9, 2))
    )
    error = {"kind": "error", "message": "no luck", "traceback": ""}
    broken = replace(entry("swin", "row", {}), status="failed", error=error, probes=None)
    for records in ([old, new, broken], [new, old, broken]):
        (table,) = probes.tables(records)
        assert table.shown["bind"].tolist() == ["0.90 ± 0.00"]
        assert probes.blocks(records)[-1] == "swin (row) failed: no luck"
    assert probes.blocks([broken]) == []


def test_what_a_command_asked_for_stands_for_its_subject(tmp_path, caplog):
    first, second = (
        replace(entry("mine", "mechanism", {"find": s}), key=key, created=f"2026-01-0{day}")
        for day, (key, s) in enumerate((("a", 0.9), ("b", 0.3)), start=1)
    )
    for one in (first, second):
        store.write(one, tmp_path / "probes")
    assert [one.key for one in probes.load(tmp_path)] == ["b"]
    assert "probes of mine of 2026-01-01, as those of 2026-01-02 stand for it" in caplog.text
    # Its file is what it was before.
    assert [one.key for one in probes.load(tmp_path, [first])] == ["a"]


def test_one_seed_is_reported_with_its_limits():
    records = [entry(n, "mechanism", {"bind": s}, seeds=1) for n, s in (("a", 0.9), ("b", 0.5))]
    table = probes.tables(records)[0]
    assert "One seed" in table.notes[0] or "one seed" in table.notes[0]
    assert "\N{PLUS-MINUS SIGN}" not in table.shown["bind"][0]


def test_plots_show_the_scores_under_their_names():
    scores = {"full": (0.9, 0.3), "ViL": (0.5, 0.95), "pooling": (0.4, 0.35)}
    records = [
        entry(row, "row", dict(zip(("find", "count"), values, strict=True)))
        for row, values in scores.items()
    ]
    (ax, _) = probes.heat_map(records).axes
    tasks, rows = (
        [tick.get_text() for tick in of] for of in (ax.get_xticklabels(), ax.get_yticklabels())
    )
    shades = ax.images[0].get_array()
    assert ax.images[0].get_clim() == (0.25, 1)
    for text in ax.texts:
        column, line = text.get_position()
        wanted = scores[rows[line]][("find", "count").index(tasks[column])]
        assert abs(float(text.get_text()[:4]) - wanted) < 0.02
        assert abs(shades[line, column] - wanted) < 0.02
    assert len(ax.texts) == 6
    panels = [ax for ax in probes.curves(records).axes if ax.get_visible()]
    assert sorted(ax.get_title(loc="left") for ax in panels) == sorted(scores)
    for ax in panels:
        own = next(one for one in records if one.row == ax.get_title(loc="left"))
        for bars, task in zip(ax.containers, ("find", "count"), strict=True):
            line, _, (spread,) = bars
            right = np.array(own.probes["tasks"][task]["right"]).mean(axis=2) / 100
            assert line.get_ydata() == pytest.approx(right.mean(axis=0))
            (low, high) = spread.get_segments()[0][:, 1]
            assert high - low == pytest.approx(2 * right[:, 0].std(ddof=1))


def test_probes_in_the_folder_of_a_suite_leave_its_page_whole(tmp_path):
    store.write(make("ViL"), tmp_path / "records")
    records = [entry(row, "row", {"bind": score}) for row, score in (("ViL", 0.9), ("full", 0.5))]
    for one in records:
        store.write(one, tmp_path / "probes")
    page.write_probes(records, tmp_path, title="T")
    text = (tmp_path / "index.md").read_text()
    assert text.index("## Answer") < text.index("## Probes") < text.index("## Environment")
    data = pd.read_parquet(tmp_path / export.NAME)
    own = data[(data["section"] == "probes") & (data["row"] == "ViL")].set_index("figure")["value"]
    assert own["bind"] == pytest.approx(0.9, abs=0.02)
    assert own[["bind.level.1", "bind.level.2"]].mean() == pytest.approx(own["bind"])
    assert own.filter(like="seed").mean() == pytest.approx(own["bind"])
    assert own.filter(like="seed").index.tolist() == [f"bind.seed.{n}" for n in (0, 1, 2)]


@pytest.mark.parametrize(
    ("letters", "short"), [("", ""), ("a", "a"), ("bc", "bc"), ("cdefg", "c-g"), ("abce", "a-ce")]
)
def test_letters_that_follow_each_other_fit_a_cell(letters, short):
    assert probes._short(letters) == short
