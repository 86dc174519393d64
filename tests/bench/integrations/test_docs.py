import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs" / "integrations.md"
EXAMPLES = re.findall(r"^## (\w+)$|```python\n(.*?)```", DOCS.read_text(), re.M | re.S)


def examples():
    section = ""
    for heading, code in EXAMPLES:
        section = heading or section
        if code:
            marks = [pytest.mark.detectron2] if section == "detectron2" else []
            yield pytest.param(code, id=f"{section}-{code.split()[1]}", marks=marks)


@pytest.mark.parametrize("code", examples())
def test_the_examples_run(code):
    assert len(code.splitlines()) <= 12
    exec(code, {})


def test_every_integration_is_documented():
    folder = Path(importlib.util.find_spec("bench.integrations").origin).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules <= {heading for heading, _ in EXAMPLES}
