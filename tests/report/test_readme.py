"""The first screen of the README is what its records give."""

from pathlib import Path

import pytest

from bench.errors import InputError
from report import readme

ROOT = Path(__file__).parents[2]
FOLDER = Path("results/measured/cpu-2-cores/quick")


def test_the_first_screen_is_made_from_the_committed_records(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    made, png = readme.screen(FOLDER, Path("docs/answer.png"))
    assert made in (ROOT / "README.md").read_text(encoding="utf-8")
    assert png.startswith(b"\x89PNG")
    assert (ROOT / "docs" / "answer.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_records_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no record"):
        readme.screen(tmp_path, Path("x.png"))
    assert readme.main([str(tmp_path), str(tmp_path / "README.md")]) == 2
    assert "no record" in capsys.readouterr().err
