import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cli, options
from bench.errors import InputError

ROOT = Path(__file__).parents[2]


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
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "exit code" in capsys.readouterr().out


def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    name, module = next(iter(cli.find_commands().items()))

    def fail(_options):
        raise InputError("size 0 is not positive")

    monkeypatch.setattr(module, "run", fail)
    monkeypatch.setattr(module, "configure", lambda _parser: None)
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"python -m bench {name}: error: size 0 is not positive\n"


def test_an_unknown_command_lists_the_known(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["profle"])
    assert ended.value.code == 2
    assert "profle" in capsys.readouterr().err


def test_types_of_arguments():
    assert options.image_size("800x1344") == (800, 1344)
    assert options.image_size("512") == (512, 512)
    assert options.names("a, b,a") == ("a", "b")
    assert options.positive("3") == 3
    assert options.seconds("0.5") == 0.5


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
    ],
)
def test_wrong_arguments_are_named(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"no|names nothing"):
        kind(text)


def test_report_of_what_is_no_folder(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "none is no folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no record in" in capsys.readouterr().err
