import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cli, options
from bench.errors import InputError

ROOT = Path(__file__).parents[3]


def test_help_lists_every_command_and_needs_no_torch():
    code = (
        "import sys; from bench import cli; print(cli.parser().format_help());"
        " sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, module in cli.find_commands().items():
        assert f"    {name}" in done.stdout
        assert module.HELP.split()[0] in done.stdout


@pytest.mark.parametrize("name", cli.find_commands())
def test_every_command_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "exit code" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "examples:\n  python -m bench" in shown


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    name, module = next(iter(cli.find_commands().items()))

    def fail(_options):
        raise InputError("size 0 is not positive")

    monkeypatch.setattr(module, "run", fail)
    monkeypatch.setattr(module, "configure", lambda _parser: None)
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"python -m bench {name}: error: size 0 is not positive\n"


def test_an_unknown_command_lists_the_known(capsys):
    assert cli.main(["profle"]) == 2
    error = capsys.readouterr().err
    assert "unknown value 'profle' (did you mean 'profile'?); allowed: audit, check" in error


def test_types_of_arguments():
    assert options.image_size("800x1344") == (800, 1344)
    assert options.image_size("512") == (512, 512)
    assert options.names("a, b,a") == ("a", "b")
    assert options.positive("3") == 3
    assert options.seconds("0.5") == 0.5
    assert options.count("0") == 0
    assert options.grid("50x84") == (50, 84)
    assert options.modes("train, inference") == ("training", "inference")
    assert options.several(options.count)("0,4") == (0, 4)
    assert options.memory_budget("1.5GiB") == 1.5 * 2**30


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (options.image_size, "0x32"),
        (options.image_size, "800*1344"),
        (options.positive, "0"),
        (options.positive, "-1"),
        (options.seconds, "-1"),
        (options.seconds, "nan"),
        (options.names, " , "),
        (options.count, "-1"),
        (options.count, "1.5"),
        (options.repeats, "1"),
        (options.seed, str(2**63)),
        (options.grid, "5"),
        (options.one_name, "all"),
        (options.modes, "train,infer"),
        (options.memory_budget, "24XB"),
        (options.several(options.positive), "1,0"),
    ],
)
def test_wrong_arguments_are_named(kind, text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"'[^']*'.* (is|names|value)|unknown value"
    ):
        kind(text)


def test_report_of_what_is_no_folder(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "none is no folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no record in" in capsys.readouterr().err


def parsers(parser=None):
    """Every parser that has options, by its command."""
    parser = parser or cli.parser()
    nested = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    for found in nested[0].values() if nested else ():
        yield from parsers(found)
    if not nested:
        yield parser


def test_a_shared_option_is_of_one_kind_in_every_command():
    shared = {}
    for parser in parsers():
        for action in parser._actions:
            for name in action.option_strings:
                if name.removeprefix("--") in options.SHARED:
                    shared.setdefault(name, []).append((parser.prog, action))
    assert {"--attention", "--backbone", "--device", "--format", "--seed"} <= set(shared)
    for name, found in shared.items():
        spec = options.SHARED[name.removeprefix("--")]
        for prog, action in found:
            # A checkpoint is of one row, and eval prints table and JSON together.
            own = {("--attention", options.one_name), ("--format", action.type)}
            assert action.type == spec.get("type") or (name, action.type) in own, (prog, name)
            assert action.help, (prog, name)


@pytest.mark.parametrize("parser", parsers(), ids=lambda parser: parser.prog)
def test_defaults_are_shown_and_valid(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if not action.option_strings or action.default in (None, False, [], (), argparse.SUPPRESS):
            continue
        shown = "all" if action.dest == "what" else action.default
        assert f"(default: {shown})" in text
        parser._get_value(action, str(action.default))


def parsed(*arguments):
    return cli.parser().parse_args(arguments)


def test_overrides_may_stand_anywhere():
    found = parsed("profile", "seed=1", "--attention", "ViL", "a.b=2", "--amp", "c=3")
    assert found.overrides == ["seed=1", "a.b=2", "c=3"]
    assert parsed("check", "full", "--format", "json", "ViL").mechanisms == ["full", "ViL"]
    assert parsed("profile").overrides == []


@pytest.mark.parametrize("command", ["profile", "sweep"])
def test_amp_is_mixed_precision_of_the_device(command):
    assert options.precision(parsed(command)) == "32-true"
    assert options.precision(parsed(command, "--amp", "--device", "cpu")) == "bf16-mixed"
    assert options.precision(parsed(command, "--amp", "--device", "cuda:1")) == "16-mixed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["--verbose", "report", "x"], "unknown argument '--verbose'"),
        (["profile", "--attenton", "ViL"], "'--attenton' (did you mean '--attention'?)"),
        (["report", ".", "--titl", "x"], "did you mean '--title'?"),
        (["profile", "--method=mask"], "--method: unknown value 'mask' (did you mean 'mask_rcnn'"),
        (
            ["profile", "--image-size", "-5x3"],
            "one that begins with a dash is given as --name=VALUE",
        ),
        (["sweep", "--batch-sizes", "1,x"], "--batch-sizes: 'x' is no positive whole number"),
        (["sweep", "--what", "parameters"], "allowed: flops, memory, latency"),
        (["convert", "--source", "a"], "the following arguments are required: --output"),
        (["data"], "the following arguments are required: ACTION"),
        (["data", "chek"], "ACTION: unknown value 'chek' (did you mean 'check'?)"),
        (["data", "speed", "--workers", "1,-2"], "'-2' is no whole number, 0 or more"),
        (["report", ".", "--titel", "x"], "did you mean '--title'?"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_of_the_command(arguments, said, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("python -m bench")
    assert ": error: " in captured.err


@pytest.mark.parametrize("arguments", [["profile", "--device", "cpu"], ["audit"]])
def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(
    arguments, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    assert cli.main([*arguments, "--output", str(tmp_path / "file")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"--output {tmp_path / 'file'}" in captured.err
