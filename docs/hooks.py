"""Pages that mkdocs makes: one for every mechanism, from its docstrings, formulas and records."""

import inspect
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "measured" / "cpu-2-cores" / "quick"
Records = dict[str, list[tuple[Path, dict[str, Any]]]]
# The stages of ViL-Small for images of 800x1344: grid, dim, heads.
STAGES = (((200, 336), 96, 3), ((100, 168), 192, 3), ((50, 84), 384, 6), ((25, 42), 768, 12))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the mechanisms."""
    # mkdocs forgets what is added while it reads this file.
    sys.path.insert(0, str(ROOT))
    import attentions

    rows = yaml.safe_load((ROOT / "configs" / "rows.yaml").read_text(encoding="utf-8"))
    index = ["# Mechanisms\n", "| name | rows | in a few words |", "|---|---|---|"]
    records = _records()
    for path in sorted(RECORDS.glob("*/*.json")):
        place = f"records/{path.parent.name}/{path.name}"
        content = path.read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=content))
    for name in attentions.names():
        factory = attentions.find(name)
        own = [row for row, spec in rows.items() if spec["attention"] == name]
        module = inspect.getdoc(sys.modules[factory.__module__]) or ""
        first = module.splitlines()[0].rstrip(".")
        index.append(f"| [{name}]({name}.md) | {', '.join(own)} | {first} |")
        content = _page(name, factory, module, own, rows) + _measured(name, own, records)
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


def _records() -> Records:
    """The committed records that are done, by kind and by the row or mechanism they are of."""
    found: Records = defaultdict(list)
    for path in sorted(RECORDS.glob("*/*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        kind = path.parent.name
        if kind == "probes":
            kind = f"probes of a {one['config']['kind']}"
        # Passes over all rows, in latency/, are of none.
        if one.get("status") == "done":
            found[f"{kind}: {one['row']}"].append((path, one))
    return found


def _measured(name: str, own: list[str], records: Records) -> str:
    """What the committed records say of a mechanism and its rows, each with a link to them."""
    lines = []
    for path, probed in records.get(f"probes of a mechanism: {name}", ()):
        for task, result in probed["probes"]["tasks"].items():
            # As the report's: the mean of its levels, images and seeds.
            asked = _flat(result["asked"])
            shares = (
                r / a for one in result["right"] for r, a in zip(_flat(one), asked, strict=True)
            )
            said = f"{fmean(shares):.2f} right"
            lines.append(f"| probe {task} ({result['asks']}) | {said} | {_links([path])} |")
    for row in own:
        paths, runs = _of(records, f"records: {row}")
        if runs:
            model, images = runs[0]["model"]["backbone"], runs[0]["evaluation"]["images"]
            seeds = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
            for kind in ("box", "mask"):
                value = fmean(one["evaluation"][kind]["AP"] for one in runs)
                what = f"{row}: {kind} mAP of {model}, {images} images, {seeds}"
                lines.append(f"| {what} | {value:.1f} % | {_links(paths)} |")
        paths, runs = _of(records, f"costs: {row}")
        for path, one in zip(paths[:1], runs, strict=False):
            size = "x".join(map(str, one["flops"]["image_size"]))
            figures = [
                ("parameters", one["parameters"]["total"] / 1e6, "M"),
                ("multiply-adds of the detector", one["flops"]["total"] / 1e9, "G"),
            ]
            training = one["memory"].get("predicted", {}).get("training")
            if training:
                what = f"predicted memory of training, {one['memory']['batch_size']} images"
                figures.append((what, training["total"] / 1e9, "GB"))
            lines += [
                f"| {row}: {what}, {one['model']['backbone']}, {size} | {value:.1f} {unit}"
                f" | {_links([path])} |"
                for what, value, unit in figures
            ]
    if not lines:
        return ""
    head = ["\n## Measured here\n", "| what | figure | record |", "|---|---|---|"]
    return "\n".join([*head, *lines, ""])


def _of(records: Records, key: str) -> tuple[list[Path], list[dict[str, Any]]]:
    found = records.get(key, [])
    return [path for path, _ in found], [one for _, one in found]


def _links(paths: list[Path]) -> str:
    return ", ".join(f"[{path.stem}](../records/{path.parent.name}/{path.name})" for path in paths)


def _flat(value: Any) -> list[float]:
    """The numbers of nested lists."""
    return [each for one in value for each in _flat(one)] if isinstance(value, list) else [value]


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
