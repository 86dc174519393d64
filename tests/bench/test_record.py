"""Records: what goes in comes out, and nothing is lost or overwritten while writing."""

import errno
import functools
import json
import os
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import record as store
from bench.errors import InputError
from bench.record import Record
from tests.records import plain

ERROR = {"kind": "error", "message": "it broke", "traceback": "Traceback"}


def make(**changes: Any) -> Record:
    key, config = store.key({"seed": 0}), {"seed": 0, "data": {"min_sizes": [128]}}
    return plain(**({"row": "srformer/64", "key": key, "config": config} | changes))


def failed(**changes: Any) -> Record:
    return make(status="failed", error=ERROR, **changes)


def training(*losses: Any) -> dict[str, Any]:
    entries = [{"step": step, "total": value} for step, value in enumerate(losses)]
    return {"steps": len(losses), "seconds": 1.0, "losses": entries}


def test_round_trip() -> None:
    record = failed(training=training(2.5, 1e-300, 0.1), notes=["Größe 5 €"])
    assert Record.from_json(record.to_json()) == record


def test_paths_that_are_not_utf_8_are_written_and_read(tmp_path: Path) -> None:
    path = os.fsdecode(b"/data/k\xe4fer")
    record = failed(config={"data": {"path": path}}, notes=[f"{path}/Größe"])
    assert store.read(store.write(record, tmp_path)) == record


def test_numbers_that_json_does_not_have_become_null() -> None:
    values = [float("nan"), float("inf"), np.float32("nan"), np.float64("-inf"), np.float32(1.5)]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = make(training=training(*values, np.int64(3), (1, 2))).to_json()
    losses = json.loads(text, parse_constant=refuse)["training"]["losses"]
    assert [entry["total"] for entry in losses] == [None, None, None, None, 1.5, 3, [1, 2]]


def test_a_value_without_a_place_in_json_is_named() -> None:
    with pytest.raises(TypeError, match="object"):
        make(config={"x": object()}).to_json()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "good"}, "status 'good'"),
        ({"status": "failed"}, "error is None"),
        ({"error": ERROR}, "status is 'done'"),
        ({"status": "failed", "error": {**ERROR, "kind": "bug"}}, "kind 'bug'"),
        ({"seed": "0"}, "seed is '0'"),
        ({"flops": {"total": 1}}, "flops lacks unit, convention"),
        ({"latency": 3.0}, "latency is 3.0"),
        ({"model": {}}, "model lacks backbone"),
        ({"notes": "one"}, "notes"),
        ({"schema": 2}, "schema 2"),
    ],
)
def test_a_malformed_record_cannot_be_made(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", "{}", '{"schema": 1}', '{"schema": 2}', make().to_json()[:-20]],
)
def test_a_file_that_holds_no_record_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"odd\.json") as caught:
        store.read(path)
    assert "\n" not in str(caught.value)


def test_a_name_twice_as_of_two_files_merged_is_named() -> None:
    text = make().to_json().replace('"seed"', '"notes": ["theirs"], "seed"', 1)
    with pytest.raises(InputError, match="is not JSON: 'notes' stands twice in one object"):
        Record.from_json(text)


def test_other_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    with pytest.raises(InputError, match=r"odd\.json: No such file"):
        store.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"odd\.json"):
        store.read(path)
    values = json.loads(make().to_json()) | {"colour": "red"}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"odd\.json.*unknown colour"):
        store.read(path)


def test_write_names_files_by_row_and_key(tmp_path: Path) -> None:
    record = make()
    path = store.write(record, tmp_path / "new" / "records")
    assert path.name == f"srformer-64-{record.key[:10]}.json"
    assert store.read(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_failures_are_numbered_and_kept(tmp_path: Path) -> None:
    paths = [store.write(failed(seed=n, config={"seed": n}), tmp_path) for n in range(3)]
    assert [path.stem.rpartition("-failed-")[2] for path in paths] == ["1", "2", "3"]
    assert [store.read(path).seed for path in paths] == [0, 1, 2]
    assert store.write(make(), tmp_path).name == store.done_name("srformer/64", make().key)


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = store.write(make(), tmp_path)
    with pytest.raises(InputError, match="exists already"):
        store.write(make(seed=1), tmp_path)
    assert store.read(path).seed == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_latencies_of_two_machines_in_one_second_are_two_sessions(tmp_path: Path) -> None:
    found = []
    for number, seconds in enumerate((0.1, 0.2, 0.1)):
        inference = {"median": seconds, "q1": seconds, "q3": seconds, "samples": [seconds] * 3}
        row = {"row": "ViL", "key": "a", "latency": {"unit": "s", "inference": inference}}
        path = tmp_path / str(number) / "20261130T161820.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"rows": [row]}))
        found.append(store.read_latencies(path.parent)["ViL", "a"]["session"])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match=os.strerror(number)) as caught:
        store.write(make(), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the record of srformer/64"):
        store.write(make(), tmp_path / "file" / "records")


def test_without_hard_links_a_record_is_still_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    path = store.write(make(), tmp_path)
    with pytest.raises(InputError, match="exists already"):
        store.write(make(seed=1), tmp_path)
    assert store.read(path).seed == 0
    assert [store.write(failed(), tmp_path).stem[-1] for _ in range(2)] == ["1", "2"]
    assert not list(tmp_path.glob(".*"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_key_does_not_depend_on_order(config: dict[str, Any]) -> None:
    turned = OrderedDict(reversed(config.items()))
    assert store.key(config) == store.key(turned)
    assert len(store.key(config)) == 64


def test_key_is_the_same_in_every_version_and_tells_values_apart() -> None:
    # Records on disk are found by it, so it must not change.
    assert store.key({"b": [1, 2.5, None], "a": "é"}) == (
        "84afbf1d4853005f9dd0c81cb1819b53ce86978340764c062160f6e8356665de"
    )
    assert store.key({"size": (1, 2)}) == store.key({"size": [1, 2]})
    configs: list[dict[str, Any]] = [
        {"x": 1},
        {"x": 1.5},
        {"x": "1"},
        {"x": None},
        {"x": True},
        {"y": 1},
        {"x": {}},
        {},
    ]
    assert len({store.key(config) for config in configs}) == len(configs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViL", "vil"),
        ("Partial srformer/32", "partial-srformer-32"),
        ("my_module.py:MyAttention", "my-module-py-myattention"),
        ("../../etc", "etc"),
        ("日本", "row"),
        ("x" * 300, "x" * 80),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert store.slug(name) == expected


def test_environment_is_complete_and_plain() -> None:
    found = store.environment(
        command=["python", "run_all.py", "--rows", "ViL,Partial ViL"], device="cpu"
    )
    assert found["command"] == "python run_all.py --rows 'ViL,Partial ViL'"
    assert found["cores"] >= 1
    assert found["packages"]["torch"]
    assert json.loads(json.dumps(found)) == found
    assert Record.from_json(make(environment=found).to_json()).environment == found


def git_in(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def committed(git: Callable[..., str], code: Path) -> str:
    """Commit a first file, and return the commit."""
    code.parent.mkdir()
    code.write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    return git("rev-parse", "HEAD")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_checkout_tells_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = functools.partial(git_in, tmp_path)
    assert store.checkout(tmp_path) == (None, None)
    git("init")
    assert store.checkout(tmp_path) == (None, None)
    code = tmp_path / "bench" / "a.py"
    commit = committed(git, code)
    assert store.checkout(tmp_path) == (commit, False)
    # Results that lie in the checkout do not make the code another one.
    (tmp_path / "output.json").write_text("")
    assert store.checkout(tmp_path) == (commit, False)
    code.write_text("2")
    assert store.checkout(tmp_path) == (commit, True)
    # A package installed inside somebody's checkout is not that checkout.
    assert store.checkout(code.parent) == (None, None)
    # As in a hook of another repository.
    subprocess.run(["git", "init", str(tmp_path / "other")], check=True, capture_output=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert store.checkout(tmp_path) == (commit, True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_has_the_commit_that_its_process_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = functools.partial(git_in, tmp_path)

    def said() -> tuple[str, bool]:
        found = store.environment(command="", device="cpu")
        return found["commit"], found["dirty"]

    git("init")
    code = tmp_path / "bench" / "record.py"
    commit = committed(git, code)
    store.code_at_start(tmp_path)
    monkeypatch.setattr(store, "code_running", functools.partial(store.code_running, tmp_path))
    assert said() == (commit, False)
    # Results that are committed meanwhile leave the code as it is.
    (tmp_path / "results.json").write_text("")
    git("add", ".")
    git("commit", "-m", "results")
    assert said() == (commit, False)
    code.write_text("2")
    assert said() == (commit, True)
    git("commit", "-am", "two")
    assert said() == (commit, True)
    git("checkout", commit)
    assert said() == (commit, False)
