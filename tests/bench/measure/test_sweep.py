import io
import json
import textwrap
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import attentions
from bench import record
from bench.cli import main
from bench.commands import sweep as command
from bench.commands.sweep import image_sizes
from bench.config.schema import MODES, SWEPT
from bench.config.suites import families
from bench.errors import InputError
from bench.measure import flops, sweep, worker
from bench.measure.costs import effort, flops_of_one
from bench.measure.sweep import Limits, Store, Task, unfinished
from bench.measure.worker import Server
from bench.model.build import build_backbone
from report.scaling import growth
from tests import mechanisms

SIZES = ((32, 32), (64, 64), (96, 96), (128, 128))


def plan(names, sizes=SIZES, **options):
    values = {"device": "cpu", "profile": {"repeats": 2, "seconds": 0.0}}
    defaults = {"backbone": "quick", "modes": ("inference",), "values": values}
    return sweep.plan(names, sizes=sizes, **defaults | options)


def run(planned, output, *, limits=None, console=None):
    return sweep.sweep(
        planned,
        output=output,
        limits=limits or Limits(seconds=600.0),
        command=["python", "-m", "bench", "sweep"],
        console=console or Console(file=io.StringIO()),
    )


@pytest.fixture
def mechanism(tmp_path):
    """Write a mechanism that does something at a certain number of rows, and return its name."""

    def write(**does):
        steps = "\n".join(f"if grid[0] == {rows[1:]}: {what}" for rows, what in does.items())
        guarded = f'if x.device.type != "meta":\n{textwrap.indent(steps, "    ")}'
        return mechanisms.write(tmp_path / "odd.py", guarded)

    return write


class Interrupting(io.StringIO):
    """Ctrl-C as soon as a point is reported."""

    def write(self, text):
        if "multiply-adds" in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_interrupted_then_out_of_memory_then_nothing_left(tmp_path, mechanism, monkeypatch):
    (walk,) = plan([mechanism(_16="torch.empty(2 * 10**9)")], sizes=SIZES[:3])
    limits = Limits(memory=4 * 10**9, seconds=600.0)
    with pytest.raises(KeyboardInterrupt):
        run([walk], tmp_path, limits=limits, console=Console(file=Interrupting()))
    first = json.loads(next((tmp_path / "records").glob("*.json")).read_text())
    assert first["status"] == "done"

    points = run([walk], tmp_path, limits=limits)
    assert points[0].created == first["created"], "what was measured is not measured again"
    assert [(p.error or {}).get("kind") for p in points] == [None, "out_of_memory", "skipped"]
    assert "larger than 64x64, which ran out of memory" in points[2].error["message"]
    assert [p.memory and p.memory["inference"] > 0 for p in points] == [True, None, None]
    assert all(p.flops["total"] > 0 for p in points), "counted for what cannot be measured too"
    assert len(points[0].latency["inference"]["samples"]) >= 2
    assert points[0].latency["training"] is None
    assert points[1].environment["limits"] == {"memory": 4 * 10**9, "seconds": 600.0}

    monkeypatch.setattr(sweep, "_Walker", None)
    assert run([walk], tmp_path, limits=limits) == points


def test_an_error_ends_a_point_and_a_killed_process_ends_the_walk(tmp_path, mechanism):
    name = mechanism(_24="raise ValueError('odd size')", _40="os.kill(os.getpid(), signal.SIGKILL)")
    # Of sizes whose grids differ in all stages.
    points = run(plan([name], sizes=[(side, side) for side in (32, 96, 160, 224)]), tmp_path)
    kinds = [(point.error or {}).get("kind") for point in points]
    assert kinds == [None, "error", "out_of_memory", "skipped"]
    assert "odd size" in points[1].error["message"]
    assert "killed" in points[2].error["message"]
    # It was reported before the process died.
    assert points[0].latency["inference"]["median"] > 0


def test_what_takes_too_long_is_stopped(tmp_path, mechanism):
    (walk,) = plan([mechanism(_16="time.sleep(600)")], sizes=SIZES[:3])
    points = run([walk], tmp_path, limits=Limits(seconds=20.0))
    assert [(p.error or {}).get("kind") for p in points] == [None, "too_slow", "skipped"]
    assert "took more than 20 s" in points[1].error["message"]


@pytest.fixture
def store(tmp_path):
    return lambda **limits: Store(tmp_path / "records", Limits(**limits), ["x"])


def fail(store, point, kind):
    task = Task(point, "")
    return store.write(task, {"kind": kind, "message": ""}, store.limits.memory)


@pytest.mark.parametrize(
    ("kind", "then", "now", "again"),
    [
        ("out_of_memory", {"memory": 100}, {"memory": 100}, False),
        ("out_of_memory", {"memory": 100}, {"memory": 200}, True),
        ("out_of_memory", {"memory": 100}, {}, False),
        ("too_slow", {"seconds": 5.0}, {"seconds": 5.0}, False),
        ("too_slow", {"seconds": 5.0}, {"seconds": 50.0}, True),
        ("too_slow", {"seconds": 5.0}, {}, True),
        ("error", {}, {}, True),
    ],
)
def test_what_failed_is_tried_again_under_a_larger_limit(store, kind, then, now, again):
    (walk,) = plan(["full"])
    old = store(**then)
    fail(old, walk[1], kind)
    fail(old, walk[2], "skipped")
    tasks = unfinished(walk, store(**now))
    places = [walk.index(task.point) for task in tasks]
    assert places == ([0, 1, 2, 3] if again else [0, 3])
    # The last one has no record yet, but needs none of a measurement.
    assert ["larger than 64x64" in task.skipped for task in tasks][-1] is not again


def test_a_success_stands_above_all_failures(store):
    (walk,) = plan(["full"])
    fail(store(), walk[0], "error")
    done = store().write(Task(walk[0], ""), None, None)
    assert store().records[walk[0].key] == done
    assert walk[0] not in [task.point for task in unfinished(walk, store())]


def test_flops_alone_need_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep._Walker, "_measure", None)
    planned = plan(["full"], modes=MODES, what=("flops",), sizes=SIZES[:2])
    points = run(planned, tmp_path)
    assert [point.flops["mode"] for point in points] == ["inference"] * 2 + ["training"] * 2
    assert all(point.memory is None and point.latency is None for point in points)


def test_a_point_says_what_was_not_measured():
    why = "memory of training not measured: it does not run where its tensors are watched"
    point = SimpleNamespace(
        config={"sweep": {"mode": "training"}},
        error=None,
        flops={"total": 2e9},
        memory={"training": None},
        latency=None,
        notes=(why, "something else"),
    )
    assert sweep.describe(point) == f"2.00 G multiply-adds, {why}"


def test_walks_rise_and_differ_in_size_alone():
    planned = plan(["full", "ViL"], sizes=[(64, 96), (32, 32)], modes=MODES, batch_sizes=(1, 2))
    assert len(planned) == 8
    for walk in planned:
        assert [point.size for point in walk] == [(32, 32), (64, 96)]
        assert len({(p.config.row, p.mode, p.config.profile.batch_size) for p in walk}) == 1
        assert all(tuple(point.config.data.fixed_size) == point.size for point in walk)


def test_all_is_every_mechanism_once():
    planned = plan(["all"], sizes=SIZES[:1])
    found = [walk[0].config.model.attention for walk in planned]
    assert sorted(found) == sorted(attentions.names())


def test_a_key_depends_on_what_the_numbers_depend_on():
    (walk,) = plan(["full"], SIZES[:2])
    keys = [point.key for point in walk]
    assert len(set(keys)) == len(walk)
    values = {
        "device": "cpu",
        "profile": {"repeats": 2, "seconds": 0.0},
        "evaluate": {"batch_size": 9},
    }
    assert [p.key for p in plan(["full"], SIZES[:2], values=values)[0]] == keys
    for other in (
        {"overrides": ["train.precision=bf16-mixed"]},
        {"modes": ("training",)},
        {"what": ("flops",)},
        {"scope": "attention"},
        {"batch_sizes": (2,)},
        {"backbone": "tiny"},
    ):
        assert not {point.key for point in plan(["full"], SIZES[:2], **other)[0]} & set(keys)


def test_a_key_depends_on_what_a_users_mechanism_imports_too(tmp_path):
    mechanism = mechanisms.write(tmp_path / "mine.py", imports="if False:\n    import helper")
    keys = set()
    for width in (1, 16):
        (tmp_path / "helper.py").write_text(f"WIDTH = {width}\n")
        keys.add(plan([mechanism], SIZES[:1])[0][0].key)
    assert len(keys) == 2


def test_measurements_belong_to_a_machine_and_counts_to_all(monkeypatch):
    def keys():
        return [plan(["full"], SIZES[:1], what=(name,))[0][0].key for name in SWEPT]

    before = dict(zip(SWEPT, keys(), strict=True))
    for change in (
        lambda: monkeypatch.setattr(record, "cpu", lambda: "another"),
        lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 99),
        lambda: monkeypatch.setattr(torch, "__version__", "3.0"),
    ):
        change()
        now = dict(zip(SWEPT, keys(), strict=True))
        assert {name for name in SWEPT if now[name] == before[name]} == {"flops"}
        monkeypatch.undo()


def test_a_mechanism_for_one_size_says_so():
    (walk,) = plan(["linformer"], sizes=SIZES[:2])
    task = Task(walk[1], "")
    sweep._count(task)
    assert ["linformer works for one size only" in note for note in task.notes] == [True]


@pytest.mark.parametrize(
    ("scope", "mode"),
    [
        ("backbone", "inference"),
        ("backbone", "training"),
        ("attention", "inference"),
        ("attention", "training"),
        pytest.param("detector", "inference", marks=pytest.mark.slow),
    ],
)
def test_a_point_of_each_scope(scope, mode):
    overrides = ["model.detector.rpn_proposals=[20,10]", "model.detector.rpn_proposals_test=[9,9]"]
    (walk,) = plan(["ViL"], sizes=[(64, 96)], scope=scope, modes=(mode,), overrides=overrides)
    server = Server()
    server.build(walk[0].config.as_dict(), scope, None)
    memory, notes = server.memory((mode,), False)
    assert memory[mode] > memory["before"][mode] > 0
    assert not notes
    assert server.latency((mode,), effort(walk[0].config))[mode]["median"] > 0
    assert server.ran(mode)["sdpa"]


class Conversation(list):
    """The other side of a worker's connection; keeps its answers."""

    def __init__(self, questions):
        super().__init__()
        self.questions = iter(questions)

    def recv(self):
        try:
            return next(self.questions)
        except StopIteration:
            raise EOFError from None

    def send(self, answer):
        self.append(answer)


@pytest.mark.parametrize(("limit", "kind"), [(2**60, "out_of_memory"), (None, "error")])
def test_what_libraries_say_under_a_limit_is_out_of_memory(limit, kind, monkeypatch):
    def fail(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_limit_memory", lambda _: None)
    monkeypatch.setattr(Server, "ran", fail)
    talk = Conversation([("ran", ())])
    worker._serve(talk, 1, limit)
    ((answer, error, _cpu_seconds),) = talk
    assert answer is None
    assert error["kind"] == kind


def test_flops_of_inference_are_those_of_the_profiler():
    (walk,) = plan(["ViL"], sizes=[(96, 128)])
    config = walk[0].config
    backbone = flops_of_one("backbone", config, "inference")
    counted = flops.count_flops(build_backbone(config), image_size=(96, 128))
    assert backbone["total"] == counted.total
    place = next(build_backbone(config).attention_places())
    alone = flops_of_one("attention", config, "inference")
    assert alone["total"] == place.module.multiply_adds((24, 32))


@pytest.mark.parametrize("name", families()["linear"])
def test_flops_of_linear_attention_grow_with_the_pixels(name):
    sides = (256, 512, 1024)
    (walk,) = plan([name], backbone="small", sizes=[(side, side) for side in sides])
    costs = [flops_of_one("attention", task.config, "inference")["total"] for task in walk]
    assert growth([side**2 for side in sides], costs).exponent < 1.1


@pytest.mark.parametrize("name", attentions.names())
def test_a_training_step_costs_about_three_forward_passes(name):
    # The gradient of each product takes two products; the first convolution needs one less.
    (walk,) = plan([name], sizes=[(128, 128)])
    forward, step = (flops_of_one("backbone", walk[0].config, mode) for mode in MODES)
    # What a mechanism computes again in its backward pass counts.
    assert 2.7 < step["total"] / forward["total"] <= 3.5
    assert step["uncounted"] == {}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layer", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_backward_of_a_grouped_convolution_costs_two_forward_passes(layer, groups):
    convolution = layer(8, 8, 3, stride=2, groups=groups, device="meta")
    image = torch.empty(2, 8, 12, 12, device="meta", requires_grad=True)
    forward = flops.count_operators(lambda: convolution(image)).total
    both = flops.count_operators(lambda: convolution(image).sum().backward()).total
    assert both == 3 * forward


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("224:1024", [224, 320, 480, 704, 1024]),
        ("224:2048", [224, 320, 480, 672, 992, 1408, 2048]),
        ("224:2048:3", [224, 672, 2048]),
        ("100:200", [96, 128, 192]),
        ("224,300", [224, 300]),
        ("224", [224]),
    ],
)
def test_image_sizes(text, sides):
    assert image_sizes(text) == tuple((side, side) for side in sides)


def test_image_sizes_need_not_be_square():
    assert image_sizes("512x768, 64") == ((512, 768), (64, 64))


@pytest.mark.parametrize("text", ["", "a:b", "0:64", "512:256", "1:2:3:4", "64:512:1", "x,3"])
def test_no_image_sizes(text):
    with pytest.raises(ArgumentTypeError):
        image_sizes(text)


def test_the_command_writes_points_and_page_and_prints_tables(tmp_path, capsys):
    arguments = ["sweep", "--attention", "full,ViL", "--image-sizes", "64,128,256"]
    arguments += ["--backbone", "quick", "--what", "flops", "--output", str(tmp_path)]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert "from 1" in printed
    assert len(list((tmp_path / "records").glob("*.json"))) == 12
    assert (tmp_path / "index.md").is_file()
    assert (tmp_path / "plots" / "flops-training.png").is_file()

    assert main([*arguments, "--device", "cpu", "--format", "json"]) == 0
    output = capsys.readouterr()
    points = [record.Record.from_json(json.dumps(point)) for point in json.loads(output.out)]
    assert len(points) == 12
    assert "12 of 12 points are recorded already" in output.err

    folder, page = str(tmp_path / "records"), (tmp_path / "index.md").read_text()
    for refused in (["recommend", folder], ["report", folder, folder]):
        assert main(refused) == 2
        assert "has points of a sweep" in capsys.readouterr().err
    assert main(["report", folder]) == 0
    assert {*printed.splitlines()} <= {*capsys.readouterr().out.splitlines()}
    assert (tmp_path / "index.md").read_text() == page
    # Of two machines, say, the newest points alone.
    (old, *_) = (tmp_path / "records").glob("full*.json")
    content = json.loads(old.read_text())
    content["environment"]["cpu"], content["created"] = "another", "2020-01-01T00:00:00+00:00"
    old.write_text(json.dumps(content))
    assert main(["report", folder]) == 0
    assert "1 of 12 points, made under other conditions" in capsys.readouterr().out
    command.print_points(points, "csv")
    assert len(capsys.readouterr().out.strip().splitlines()) == 13
    command.print_points(points, "markdown")
    assert capsys.readouterr().out.startswith("## Growth and crossover, inference\n")


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(plan(["full"]), Path(tmp_path / "file"))
