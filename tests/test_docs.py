"""The documentation: every command in it is one that exists, and its pages build."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import run_all
from bench import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of every command line in a page's console blocks, without comments."""
    found, fence = [], ""
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = "" if fence else line.removeprefix("```") or "console"
        elif fence == "console":
            found.append(shlex.split(line, comments=True))
    return found


FOUND = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands(page)
    if "run_all.py" in words or ("-m" in words and "bench" in words)
    if "--help" not in words
]


@pytest.mark.parametrize("words", FOUND)
def test_a_command_of_the_documentation_is_understood(words: list[str]) -> None:
    if "run_all.py" in words:
        run_all.parser().parse(words[words.index("run_all.py") + 1 :])
        return
    words = words[words.index("bench") + 1 :]
    command: Any = argparse.Namespace(COMMANDS=cli.find_commands())
    while hasattr(command, "COMMANDS") and words[0] != "COMMAND":
        command, *words = command.COMMANDS[words[0]], *words[1:]
    if not hasattr(command, "COMMANDS"):
        cli.parser_of("bench", command).parse(words)


def test_the_pages_build(tmp_path: Path) -> None:
    config = pytest.importorskip("mkdocs.config")
    build = pytest.importorskip("mkdocs.commands.build")
    pytest.importorskip("mkdocstrings")
    loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    loaded.plugins.on_startup(command="build", dirty=False)
    # In strict mode a link that leads nowhere, or a name that is not there, is an error.
    build.build(loaded)
    page = (tmp_path / "mechanisms" / "longformer" / "index.html").read_text(encoding="utf-8")
    assert "Multiply-adds of one layer" in page
    # Figures of the committed records, and the records themselves.
    assert "ViL: box mAP" in page
    assert "probe regions" in page
    linked = re.findall(r'href="\.\./\.\./(records/[^"]+\.json)"', page)
    assert linked
    assert all((tmp_path / one).is_file() for one in linked)
    # What a signature lacks counts as required; linformer alone has such an option, its length.
    pages = {
        path.parent.name: path.read_text("utf-8") for path in tmp_path.glob("mechanisms/*/*.html")
    }
    assert [name for name, text in pages.items() if "<em>required</em>" in text] == ["linformer"]
