import errno
import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

import run_all
from bench import cli, record
from bench.errors import InputError

ROOT = Path(__file__).parents[3]


def leaves(prog=cli.PROG, commands=None):
    """Every command without commands of its own, by what it is called by."""
    for name, command in (commands or cli.find_commands()).items():
        if hasattr(command, "COMMANDS"):
            yield from leaves(f"{prog} {name}", command.COMMANDS)
        else:
            yield f"{prog} {name}", command


LEAVES = dict(leaves())


def test_help_lists_every_command_and_needs_no_torch():
    code = (
        "import sys, bench; from bench import cli;"
        "cli.main(['--help']) if 'torch' not in sys.modules else sys.exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, module in cli.find_commands().items():
        assert f"  {name:<10}{module.HELP}\n" in done.stdout


@pytest.mark.parametrize("words", [prog.split()[3:] for prog in LEAVES] + [["data"]], ids=" ".join)
def test_every_command_explains_itself(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "exit code" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert len(words) > 1 or "examples:\n  python -m bench" in shown


@pytest.mark.parametrize("prog", ["run_all.py", *LEAVES])
def test_options_show_their_defaults(prog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    parser = cli.parser_of(prog, LEAVES[prog]) if prog in LEAVES else run_all.parser()
    text = parser.format_help()
    helps = {part.split()[0]: part for part in text.split("\n  --")[1:]}
    required = {"MECHANISM [": ["ViL"], "DIR [": ["."], "--source FILE --o": ["--source", "a"]}
    required |= {" A B\n": ["a", "b"]}
    required |= {"--base COMMIT": ["--base", "a"], "--output FILE [": ["--output", "a"]}
    given = [word for sign, words in required.items() if sign in text for word in words]
    # What is parsed where nothing is given.
    for name, value in vars(parser.parse(given)).items():
        shown = helps.get(name.replace("_", "-"))
        if shown and f"--{name}" not in given and value not in (None, False, [], ()):
            assert "(default: " in shown.partition("\n\n")[0]


def test_types_of_arguments():
    assert cli.image_size("800x1344") == (800, 1344)
    assert cli.image_size("512") == (512, 512)
    assert cli.names("a, b,a") == ("a", "b")
    assert cli.positive("3") == 3
    assert cli.seconds("0.5") == 0.5
    assert cli.count("0") == 0
    assert cli.grid("50x84") == (50, 84)
    assert cli.modes("train, inference") == ("training", "inference")
    assert cli.several(cli.count)("0,4") == (0, 4)
    assert cli.memory_budget("1.5GiB") == 1.5 * 2**30


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (cli.image_size, "0x32"),
        (cli.image_size, "800*1344"),
        (cli.positive, "0"),
        (cli.positive, "-1"),
        (cli.seconds, "-1"),
        (cli.seconds, "nan"),
        (cli.names, " , "),
        (cli.count, "-1"),
        (cli.count, "1.5"),
        (cli.repeats, "1"),
        (cli.seed, str(2**63)),
        *((cli.grid, text) for text in ("5", "0x5", "axb", "5x5x5")),
        (cli.one_name, "all"),
        (cli.modes, "train,infer"),
        (cli.memory_budget, "24XB"),
        (cli.memory_budget, "24"),
        (cli.multiply_adds, "250"),
        (cli.image_size, "100000x100000"),
        (cli.several(cli.positive), "1,0"),
    ],
)
def test_wrong_arguments_are_named(kind, text):
    with pytest.raises(ArgumentTypeError, match=r"'[^']*'.* (is|names|value)|unknown value"):
        kind(text)


def parsed(name, *arguments):
    return cli.parser_of(name, cli.find_commands()[name]).parse(arguments)


@pytest.mark.parametrize("words", [["--output", ""], ["--output", " "], ["--output="]])
def test_nothing_is_not_the_working_folder(words):
    with pytest.raises(InputError, match="--output is empty"):
        run_all.parser().parse(words)
    with pytest.raises(InputError, match="an argument is empty"):
        parsed("report", "")


@pytest.mark.parametrize("value", ["nothing", "training,inference"])
def test_choices_of_a_command_hold_where_others_take_several(value):
    with pytest.raises(InputError, match="--mode: unknown value"):
        parsed("recommend", "x", "--mode", value)


def test_overrides_may_stand_anywhere():
    found = parsed("profile", "seed=1", "--attention", "ViL", "a.b=2", "--amp", "c=3")
    assert found.overrides == ["seed=1", "a.b=2", "c=3"]
    assert parsed("check", "full", "--format", "json", "ViL").mechanisms == ["full", "ViL"]
    assert parsed("report", "a", "--title", "x", "b").folders == [Path("a"), Path("b")]
    assert parsed("profile").overrides == []
    assert run_all.parser().parse(["a=1", "--seed", "3", "b=2"]).overrides == ["a=1", "b=2"]


@pytest.mark.parametrize("command", ["profile", "sweep"])
def test_amp_is_mixed_precision_of_the_device(command):
    assert cli.precision(parsed(command)) == "32-true"
    assert cli.precision(parsed(command, "--amp", "--device", "cpu")) == "bf16-mixed"
    assert cli.precision(parsed(command, "--amp", "--device", "cuda:1")) == "16-mixed"


# A command line, and a part of the one line that refuses it: one for each kind of mistake.
WRONG = {
    "": "the following arguments are required: COMMAND",
    "profle": "COMMAND: unknown value 'profle' (did you mean 'profile'?); allowed: audit, check",
    "data": "the following arguments are required: COMMAND",
    "data chek": "COMMAND: unknown value 'chek' (did you mean 'check'?)",
    "pretrain --suite x": "unknown argument '--suite' (did you mean '--seed'?)",
    "profile --attenton ViL": "unknown argument '--attenton' (did you mean '--attention'?)",
    "profile --method=mask": "--method: unknown value 'mask' (did you mean 'mask_rcnn'?)",
    "profile --image-size -wide": "one that begins with a dash is given as --name=VALUE",
    "profile --precision 16-mixed --amp": "not allowed with argument --precision",
    "profile --attention longfromer": "attention 'longfromer' (did you mean 'longformer'?)",
    "profile --backbone smal": "backbone 'smal' (did you mean 'small'?)",
    "profile train.stpes=3": "'train.stpes' (did you mean 'train.steps'?)",
    "profile --what speed": "allowed: parameters, flops, memory, latency",
    "profile --mode trainig": "unknown value 'trainig' (did you mean 'training'?)",
    "profile --device tpu": "unknown value 'tpu' (did you mean 'cpu'?); allowed: auto, cpu",
    "profile --format xml": "allowed: table, json, csv, markdown",
    "sweep --scope backbon": "did you mean 'backbone'?",
    "sweep --precision fp8": "--precision: unknown value 'fp8'",
    "sweep --device tpu": "unknown value 'tpu' (did you mean 'cpu'?); allowed: auto, cpu",
    "sweep --batch-sizes 1,x": "--batch-sizes: 'x' is not a whole number of 1 or more",
    "sweep --what parameters": "allowed: flops, memory, latency",
    "audit --grid 4x4 --published": "--published: not allowed with argument --grid",
    "audit --published --attention ViL": "leave --attention out",
    "profile --sizes val2018": "did you mean 'val2017'?",
    "convert --source a": "the following arguments are required: --output",
    "data check --workers=-2": "'-2' is not a whole number of 0 or more",
    "check longfromer": "'longfromer' (did you mean 'longformer'?)",
    "check ViL --option windw=3": "--option windw: longformer has no such option (did you mean",
    "check ViL --option window": "--option: 'window' is not of the form key=value",
    "check ViL --option window=[1": "--option: cannot read 'window=[1'",
    "check ViL --option window=0": "--option window=0: window 0 is not positive",
    "check ViL --option window=wide": "--option window=wide",
    "check ViL --option dim=3": "no such option",
    "check nowhere.py:Mine": "no such file: nowhere.py",
    "check ViL --grid 1x8": "--grid 1x8: both sides must be 2 or more",
    "check ViL --dim 7": "--dim 7 must be a multiple of --num-heads 3",
    "report /nowhere": "/nowhere is not a folder",
    "report .": "no record in .",
    "profile --attention ViL --what memory --data none": "error: no data folder none",
    # A budget needs no device.
    "profile --attention ViL --backbone quick --image-size 64 --memory-budget 1MB": "too small",
    "profile --output=": "error: --output is empty; give it a value or leave it out",
    "profile --device cpu device=cuda": "device is given twice, as 'cpu' and 'cuda'",
    "profile --batch-size 2 profile.batch_size=3": "profile.batch_size is given twice, as 2 and 3",
    "profile --image-size 64 profile.image_size=[64,96]": "as [64, 64] and [64, 96]",
    "profile --amp train.precision=32-true": "train.precision is given twice, as '--amp' and",
    "profile train.steps=4": "train.steps=4 has no effect in this command",
    "profile classify.mixup=1": "classify.mixup=1 has no effect in this command",
    "profile --fit batch-size": "--fit has no effect without --memory-budget",
    "profile --sizes val2017 --batch-size 2": "--batch-size has no effect with --sizes",
    "profile --memory-budget 8GB --what flops": "--what has no effect with --memory-budget",
    "sweep --seed 1 seed=2": "seed is given twice, as 1 and 2",
    "sweep profile.image_size=[64,64]": "profile.image_size=[64, 64] has no effect in this command",
    "convert --source a --output b train.lr=1": "train.lr=1 has no effect in this command",
    "eval --weights a --batch-size 2 evaluate.batch_size=3": "evaluate.batch_size is given twice",
    "eval --weights a --amp train.precision=32-true": "train.precision is given twice",
    "pretrain --batch-size 3": "--batch-size has no effect without --eval",
    "pretrain --jobs 3": "--jobs has no effect without --launcher local",
    "pretrain --seed 1 seed=2": "seed is given twice, as 1 and 2",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(words, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(cli.main, *words.split())
    assert WRONG[words] in said
    prog = said.partition(": error: ")[0]
    assert f"python -m bench {words}".startswith(prog)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError("size 0 is not positive"), KeyboardInterrupt()])
def test_a_command_ends_by_its_exit_code(error, monkeypatch, capsys):
    name, module = next(iter(cli.find_commands().items()))

    def fail(_options):
        raise error

    monkeypatch.setattr(module, "run", fail)
    monkeypatch.setattr(module, "configure", lambda _parser: None)
    expected = (130, "interrupted\n")
    if isinstance(error, InputError):
        expected = (2, f"python -m bench {name}: error: size 0 is not positive\n")
    assert (cli.main([name]), capsys.readouterr().err) == expected


@pytest.mark.parametrize(
    ("main", "words"),
    [(cli.main, ["recommend", "nothing"]), (run_all.main, ["--dry-run", "--init", "nothing"])],
)
def test_a_command_knows_its_code_when_it_starts(main, words, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.code_at_start.cache_clear()
    refusal(main, *words)
    assert record.code_at_start.cache_info().currsize == 1


def test_a_row_is_checked_by_its_mechanism(capsys):
    assert cli.main(["check", "Partial ViL", "--option", "window=3"]) == 0
    assert "Conformance of longformer with window=3" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["profile", "--device", "cpu"], ["audit"]])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(
    arguments, tmp_path, refusal
):
    file = tmp_path / "file"
    file.write_text("")
    assert f"--output {file}" in refusal(cli.main, *arguments, "--output", file)


def test_a_notebooks_backend_of_plots_does_no_harm():
    words = ["profile", "--attention", "full", "--backbone", "quick", "--what", "parameters",
             "--no-parts"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        env=os.environ | {"MPLBACKEND": "module://not_there"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def printing(folder):
    """What makes `report` print, of one record."""
    one = next((ROOT / "results" / "measured" / "cpu-2-cores" / "quick" / "records").iterdir())
    (folder / "records").mkdir()
    shutil.copy(one, folder / "records")
    return [folder]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["-m", "bench", "report"], ["run_all.py", "--dry-run"]])
def test_an_output_that_cannot_be_written_is_one_line(words, tmp_path):
    more = printing(tmp_path) if "bench" in words else ["--rows", "pooling", "--output", tmp_path]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *words, *more],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("cannot write the output: No space left on device\n")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes its output")
@pytest.mark.parametrize("words", [["-m", "bench", "report"], ["run_all.py", "--dry-run"]])
def test_an_output_that_is_closed_is_no_mistake(words, tmp_path):
    more = printing(tmp_path) if "bench" in words else ["--rows", "pooling", "--output", tmp_path]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, *words, *more],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_may_not_be_read_is_one_line(monkeypatch, capsys, tmp_path):
    def locked(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/annotations")

    monkeypatch.setattr(Path, "is_dir", locked)
    for main, words in ((cli.main, ["data", "check", "x"]), (run_all.main, ["--init", "x"])):
        assert main([*words, *(["--output", str(tmp_path)] if main is run_all.main else [])]) == 2
        assert capsys.readouterr().err.endswith(": error: /data/annotations: Permission denied\n")
