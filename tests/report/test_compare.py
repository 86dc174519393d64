"""Two sets of records against each other, and the command that prints it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cli
from bench import record as store
from bench.record import Record
from report import compare, confidence, tables
from tests.report.test_confidence import common, evaluated
from tests.report.test_report import failed, make, pretrained
from tests.report.test_seeds import seeded


def row(
    name: str, shift: float = 0.0, noise: int = 1, slower: float = 1.0, **changes: Any
) -> Record:
    """A record with draws, whose latency is `slower` than that of others."""
    one = evaluated(name, common(shift, 0.5, seed=noise))
    latency = dict(one.latency or {})
    for mode in ("inference", "training"):
        samples = slower * np.random.default_rng(0).normal(0.1, 0.002, 20)
        latency[mode] = {"samples": samples.tolist(), "median": float(np.median(samples))}
    return replace(one, latency=latency, **changes)


def verdicts(a: list[Record], b: list[Record]) -> dict[str, str | None]:
    lines = compare.compare(a, b).lines
    return {line["quantity"]: line["verdict"] for line in lines}


def test_what_changed_is_told_apart_from_chance() -> None:
    memory = {**(make("ViL").memory or {}), "training": 1}
    found = verdicts([row("ViL")], [row("ViL", shift=-2, slower=1.1, memory=memory)])
    assert found["box mAP"] == "worse"
    assert found["latency, inference"] == found["latency, training"] == "worse"
    assert found["memory, training"] == "better"
    assert found["parameters"] == found["FLOPs"] == found["memory, inference"] == compare.SAME
    slightly = verdicts([row("ViL")], [row("ViL", noise=2, slower=1.0001)])
    assert slightly["box mAP"] == slightly["latency, inference"] == confidence.SAME


def test_the_newest_record_of_a_run_is_compared() -> None:
    """Where its data or mechanism changed, the one before stays beside it."""
    before, after = row("ViL"), row("ViL", shift=-2)
    after = replace(after, created="2030-01-01T00:00:00", environment={"inputs": {"data": {}}})
    assert verdicts([before], [before, after])["box mAP"] == "worse"


def test_rows_of_two_methods_are_told_apart() -> None:
    one = row("ViL")
    model = {**one.model, "method": "retinanet"}
    other = replace(one, key="other", model=model, config={**one.config, "seed": 3})
    found = compare.compare([one], [one, other])
    assert found.only == ((), ("ViL (torchvision, retinanet)",))
    assert {line["row"] for line in found.lines} == {"ViL (torchvision, mask_rcnn)"}


def test_the_commits_of_both_sides_are_said_where_they_differ() -> None:
    def of(commit: str | None, *, dirty: bool = False) -> list[Record]:
        place = {**row("ViL").environment, "commit": commit, "dirty": dirty}
        return [row("ViL", environment=place)]

    def said(a: list[Record], b: list[Record]) -> list[str]:
        return [note for note in compare.compare(a, b).notes if "ommit" in note]

    one, other = of("a" * 40), of("b" * 40, dirty=True)
    (note,) = said(one, other)
    assert note == (
        "Commits of this package that differ (A, B): aaaaaaaaaa, bbbbbbbbbb with changes."
    )
    assert said(one, one) == said(one, of(None)) == said(of(None), other) == []


def test_pairs_of_seeds_tell_apart_what_single_seeds_do_not() -> None:
    before = [seeded("ViL", seed, shift) for seed, shift in enumerate((0, 2, 4))]
    after = [seeded("ViL", seed, shift - 1) for seed, shift in enumerate((0, 2.1, 3.9))]
    assert verdicts(before, after)["box mAP"] == "worse"
    assert verdicts(before, after[::-1][:2])["box mAP"] == confidence.SAME


@pytest.mark.parametrize(
    ("change", "quantity", "why"),
    [
        ({"environment": {"cpu": "Another"}}, "latency, inference", "another machine"),
        ({"environment": {"cpu": "Another"}}, "memory, training", "another machine"),
        ({"latency": {"batch_size": 1}}, "latency, inference", "measured otherwise"),
        ({"evaluation": {"annotations_sha256": "other"}}, "box mAP", "other images"),
        ({"flops": {"convention": "published"}}, "FLOPs", "measured otherwise"),
        ({"flops": {"uncounted": {"fft": 1}}}, "FLOPs", "operators without a formula"),
        (
            {"flops": {"total": 10**9, "unsummed": 10**12}},
            "FLOPs",
            "fewer than the products in no sum",
        ),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(
    change: dict[str, Any], quantity: str, why: str
) -> None:
    one = row("ViL")
    other = replace(one, **{k: {**getattr(one, k), **v} for k, v in change.items()})
    found = compare.compare([one], [other])
    (line,) = (line for line in found.lines if line["quantity"] == quantity)
    assert (line["not_compared"], line["verdict"]) == (why, None)
    assert any(f"Not compared, {why}: " in note for note in found.notes)
    assert found.regressions(0.0) == []


def test_rows_of_values_that_are_not_finite_are_named() -> None:
    one = row("ViL")
    odd = replace(one, evaluation={**(one.evaluation or {}), "images": 9, "not_finite": 3})
    (note,) = (n for n in compare.compare([one], [odd]).notes if "finite" in n)
    assert note == "Gave values that are not finite: B, ViL (3 of 9 images)."
    assert not any("finite" in n for n in compare.compare([one], [one]).notes)
    (table,) = tables.comparison([odd])
    assert "ViL (3 of 9 images)" in " ".join(table.notes)


def classified(images: int, right: int, val: str = "v", **changes: Any) -> Record:
    """A classifier that is right for some images."""
    one = pretrained("ViL", 100 * right / images, val)
    return replace(one, evaluation={**(one.evaluation or {}), "images": images}, **changes)


def lines(a: list[Record], b: list[Record]) -> dict[str, dict[str, Any]]:
    return {line["quantity"]: line for line in compare.compare(a, b).lines}


def test_accuracies_of_classifiers_are_compared_by_newcombes_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 56 of 70 less 48 of 80, an example of the paper.
    low, high = compare._share("top1", classified(80, 48), classified(70, 56)) or (0, 0)
    assert (low, high) == pytest.approx((5.24, 33.39), abs=0.005)
    found = lines([classified(180, 179)], [classified(180, 118)])
    assert found["top-1"]["verdict"] == "worse"
    assert found["top-1"]["difference"] == pytest.approx(-100 * 61 / 180)
    assert found["top-5"]["verdict"] == confidence.SAME
    assert "box mAP" not in found
    assert "top-1" not in lines([row("ViL")], [row("ViL")])
    a, b = (write([classified(180, right)], tmp_path / f"{right}") for right in (179, 118))
    assert cli.main(["compare", str(a), str(b), "--fail-over", "5%"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Regression: ViL, top-1: 99.4 % to 65.6 % (-34.1%)" in out
    assert "Not compared, though both have it: time of training." in out
    other = write([classified(180, 118, val="w")], tmp_path / "other")
    assert cli.main(["compare", str(a), str(other), "--fail-over", "5%"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No regression of more than 5% in what was compared." in out
    assert "Not compared, other images: top-1; top-5." in out


def test_seeds_of_classifiers_are_their_mean_and_widen_the_interval() -> None:
    before = [classified(180, right, seed=seed) for seed, right in enumerate((150, 160, 170))]
    after = [classified(180, right, seed=seed) for seed, right in enumerate((120, 140, 160))]
    found = lines(before, after)["top-1"]
    assert (found["a"], found["b"]) == pytest.approx((100 * 160 / 180, 100 * 140 / 180))
    assert found["verdict"] == confidence.SAME
    assert lines(before[1:2], after[1:2])["top-1"]["verdict"] == "worse"


def write(records: list[Record], folder: Path) -> Path:
    for one in records:
        store.write(one, folder / "records")
    return folder


def test_the_command_fails_above_the_limit_and_says_by_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write([row("ViL"), row("full")], tmp_path / "a")
    b = write([row("ViL", slower=1.1), failed("full"), row("swin")], tmp_path / "b")
    assert cli.main(["compare", str(a), str(b)]) == 0
    assert cli.main(["compare", str(a), str(b), "--fail-over", "5%", "--format", "markdown"]) == 1
    out = capsys.readouterr().out
    assert "Regression: full failed in B: out of memory." in out
    assert re.search(
        r"Regression: ViL, latency, inference: [\d.]+ ms to [\d.]+ ms \(\+10\.0%\)", out
    )
    assert "Only in B: swin." in out
    assert "| ViL   | latency, inference ms |" in out
    arguments = ["compare", str(a), str(b), "--fail-over", "20%", "--format", "json"]
    assert cli.main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["regressions"] == ["full failed in B: out of memory"]
    assert found["only_in_b"] == ["swin"]
    assert {line["row"] for line in found["figures"]} == {"ViL", "full"}


def test_two_records_are_compared_whatever_their_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [store.write(row(name), tmp_path) for name in ("ViL", "full")]
    assert cli.main(["compare", *map(str, paths), "--format", "json"]) == 0
    assert "ViL and full" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, refusal: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = write([row("ViL")], tmp_path / "a"), write([row("full"), row("swin")], tmp_path / "b")
    older = tmp_path / "old" / "records" / "vil.json"
    older.parent.mkdir(parents=True)
    older.write_text(row("ViL").to_json().replace('"schema": 1', '"schema": 0'))
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([b], "no row is in both: A has ViL; B has full, swin"),
        ([older], "schema 0; this version reads schema 1"),
        ([tmp_path / "old"], "schema 0; this version reads schema 1"),
        ([tmp_path / "empty"], "no record in"),
        ([tmp_path / "none"], "neither a folder nor a record"),
        ([b, "--fail-over", "0.05"], "'0.05' is not a percentage"),
    ):
        assert said in refusal(cli.main, "compare", a, *given)
    assert "schema 0" in refusal(cli.main, "report", tmp_path / "old")
    assert not caplog.records
