"""Pages that mkdocs makes: one for every mechanism, from its docstrings and formulas."""

import inspect
import sys
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The stages of ViL-Small for images of 800x1344: grid, dim, heads.
STAGES = (((200, 336), 96, 3), ((100, 168), 192, 3), ((50, 84), 384, 6), ((25, 42), 768, 12))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the mechanisms."""
    # mkdocs forgets what is added while it reads this file.
    sys.path.insert(0, str(ROOT))
    import attentions

    rows = yaml.safe_load((ROOT / "configs" / "rows.yaml").read_text(encoding="utf-8"))
    index = ["# Mechanisms\n", "| name | rows | in a few words |", "|---|---|---|"]
    for name in attentions.names():
        factory = attentions.find(name)
        own = [row for row, spec in rows.items() if spec["attention"] == name]
        module = inspect.getdoc(sys.modules[factory.__module__]) or ""
        first = module.splitlines()[0].rstrip(".")
        index.append(f"| [{name}]({name}.md) | {', '.join(own)} | {first} |")
        content = _page(name, factory, module, own, rows)
        files.append(File.generated(config, f"mechanisms/{name}.md", content=content))
    files.append(File.generated(config, "mechanisms/index.md", content="\n".join(index) + "\n"))
    return files


def _page(name: str, factory: type, module: str, own: list[str], rows: dict[str, Any]) -> str:
    place = f"::: {factory.__module__}.{factory.__name__}"
    text = [f"# {name}\n", module, "", place, "    options: {members: false}", ""]
    spec = next((rows[row] for row in own if "dense" not in rows[row]), {})
    text += [f"Rows: {', '.join(own) or 'none'}.", "", "## Multiply-adds of one layer\n"]
    text += [
        f"At the stages of ViL-Small for one image of 800x1344, as in row {(own or [name])[0]}, by",
        "the closed form that is checked against the operators that run.",
        "",
        "| stage | grid | channels | this layer | full attention | share |",
        "|---|---|---|---|---|---|",
    ]
    for number, (grid, dim, heads) in enumerate(STAGES, start=1):
        here = _count(name, factory, spec, number, grid, dim, heads)
        full = _count("full", None, {}, number, grid, dim, heads)
        shown = (
            ["not stated", ""] if here is None else [f"{here / 1e9:.2f} G", f"{here / full:.3f}"]
        )
        text.append(
            f"| {number} | {grid[0]}x{grid[1]} | {dim} | {shown[0]} | {full / 1e9:.2f} G"
            f" | {shown[1]} |"
        )
    place = f"attentions/{Path(inspect.getfile(factory)).name}"
    return "\n".join([*text, "", f"Source: `{place}`.", ""])


def _count(
    name: str, factory: Any, spec: dict[str, Any], number: int, grid: Any, dim: int, heads: int
) -> Any:
    """Multiply-adds of a stage's layer, or None where the mechanism states no closed form."""
    import torch

    import attentions

    factory = factory or attentions.find(name)
    options = dict(spec.get("options", {}))
    parameter = getattr(factory, "arch_option", None)
    if parameter and "feature" in spec:
        options[parameter] = spec["feature"][number - 1]
    few = (1, 1, 1, 0)[number - 1]
    least = getattr(factory, "least_globals", 0)
    num_global = (spec.get("num_global") or [max(few, least)] * 4)[number - 1]
    with torch.device("meta"):
        module = attentions.build_for(
            name, grid=grid, dim=dim, num_heads=heads, num_global=num_global, **options
        )
    count = getattr(module, "multiply_adds", None)
    return None if count is None else count(grid)
