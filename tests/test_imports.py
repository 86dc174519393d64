import ast
import sys

import pytest

from tests.processes import ROOT, python

OURS = {"attentions", "bench", "configs", "report", "results", "run_all", "tests"}
# What each package may import of ours.
ALLOWED = {
    "attentions": ("attentions",),
    "bench": ("bench", "attentions"),
    "configs": (),
    "report": ("report", "bench.record", "bench.errors"),
    "run_all": ("configs", "bench", "report"),
}
# The command line stands above all, as run_all.py does, and prints tables and draws plots.
COMMAND_LINE = ("bench/cli.py", "bench/__main__.py", "bench/commands/")


def imported(path):
    """Modules that a file imports, as `package.module` where a module is taken from a package."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            is_package = (ROOT / base.replace(".", "/")).is_dir()
            yield from (f"{base}.{alias.name}" if is_package else base for alias in node.names)


def allowed(package, path):
    above = path.relative_to(ROOT).as_posix().startswith(COMMAND_LINE)
    return ("run_all", *ALLOWED["run_all"], *ALLOWED["bench"]) if above else ALLOWED[package]


def files(package):
    single = ROOT / f"{package}.py"
    return [single] if single.is_file() else sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(package)
        for name in imported(path)
        if name.partition(".")[0] in OURS
        and not any(name == ok or name.startswith(f"{ok}.") for ok in allowed(package, path))
    ]
    assert wrong == []


# The rooms of bench, each importing only of itself and of those before it; `integrations` stands on
# `model`, and `conformance` on `measure`.
LINE = (
    "errors",
    "cgroups",
    "files",
    "sections",
    "record",
    "config",
    "system",
    "data",
    "model",
    "measure",
    "run",
)
BRANCHES = {"conformance": "measure", "integrations": "model"}
ABOVE = ("cli", "commands", "__main__", "__init__")


def rooms_below(room):
    if room in ABOVE:
        return {*LINE, *BRANCHES, *ABOVE}
    top = LINE.index(BRANCHES.get(room, room))
    return {*LINE[: top + 1], room}


def test_rooms_of_bench_form_a_line():
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files("bench")
        for name in imported(path)
        if name.startswith("bench.")
        and name.split(".")[1]
        not in rooms_below(path.relative_to(ROOT / "bench").parts[0].removesuffix(".py"))
    ]
    assert wrong == []


def test_attentions_import_torch_alone():
    outside = {
        name.partition(".")[0] for path in files("attentions") for name in imported(path)
    } - sys.stdlib_module_names
    assert outside == {"attentions", "torch", "performer_pytorch"}


@pytest.mark.parametrize("module", ["bench.record", "bench.errors", "report.page"])
def test_records_and_reports_need_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    python("-c", code)
