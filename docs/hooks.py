"""Pages that mkdocs makes: one for every mechanism, from its docstrings, formulas and records."""

import inspect
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
Records = dict[str, list[tuple[Path, Any]]]


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
    of = f"::: {factory.__module__}.{factory.__name__}"
    text = [f"# {name}\n", module, "", of, "    options: {members: false}", ""]
    row = next((row for row in own if "dense" not in rows[row]), name)
    text += [f"Rows: {', '.join(own) or 'none'}.", "", "## Multiply-adds of one layer\n"]
    text += [
        f"At the stages of ViL-Small for one image of 800x1344, as in row {row}, the second layer",
        "where a stage has more than one, by the closed form that is checked against the operators",
        "that run.",
        "",
        "| stage | grid | channels | this layer | full attention | share |",
        "|---|---|---|---|---|---|",
    ]
    for (place, here), (_, full) in zip(_layers(row), _layers("full"), strict=True):
        height, width = place.spec["grid"]
        text.append(
            f"| {place.stage} | {height}x{width} | {place.spec['dim']} | {here / 1e9:.2f} G"
            f" | {full / 1e9:.2f} G | {here / full:.3f} |"
        )
    file = f"attentions/{Path(inspect.getfile(factory)).name}"
    return "\n".join([*text, "", f"Source: `{file}`.", ""])


def _layers(row: str) -> list[tuple[Any, int]]:
    """The layer of a row at each stage, and its multiply-adds."""
    from bench.measure import speed

    places = speed.cases([row], positions=("absolute",), modes=("inference",))
    return [(place, speed.least_work(place, 1)[0]) for place in places]


def _records() -> Records:
    """The committed records that are done, by kind and by the row or mechanism they are of."""
    from bench import record

    found: Records = defaultdict(list)
    for folder in (record.RECORDS, record.COSTS, record.PROBES):
        for path in sorted((RECORDS / folder).glob("*.json")):
            one = record.read(path)
            kind = f"probes of a {one.config['kind']}" if folder == record.PROBES else folder
            if one.status == "done":
                found[f"{kind}: {one.row}"].append((path, one))
    return found


def _measured(name: str, own: list[str], records: Records) -> str:
    """What the committed records say of a mechanism and its rows, each with a link to them."""
    from report import probes

    lines = []
    for path, probed in records.get(f"probes of a mechanism: {name}", ()):
        scores = probes.figures(probed)
        for task, result in probed.probes["tasks"].items():
            said = f"{scores[task]:.2f} right"
            lines.append(f"| probe {task} ({result['asks']}) | {said} | {_links([path])} |")
    for row in own:
        paths, runs = _of(records, f"records: {row}")
        if runs:
            model, images = runs[0].model["backbone"], runs[0].evaluation["images"]
            seeds = f"{len(runs)} seeds" if len(runs) > 1 else "one seed"
            for kind in ("box", "mask"):
                value = fmean(one.evaluation[kind]["AP"] for one in runs)
                what = f"{row}: {kind} mAP of {model}, {images} images, {seeds}"
                lines.append(f"| {what} | {value:.1f} % | {_links(paths)} |")
        paths, runs = _of(records, f"costs: {row}")
        for path, one in zip(paths[:1], runs, strict=False):
            size = "x".join(map(str, one.flops["image_size"]))
            figures = [
                ("parameters", one.parameters["total"] / 1e6, "M"),
                ("multiply-adds of the detector", one.flops["total"] / 1e9, "G"),
            ]
            training = one.memory.get("predicted", {}).get("training")
            if training:
                what = f"predicted memory of training, {one.memory['batch_size']} images"
                figures.append((what, training["total"] / 1e9, "GB"))
            lines += [
                f"| {row}: {what}, {one.model['backbone']}, {size} | {value:.1f} {unit}"
                f" | {_links([path])} |"
                for what, value, unit in figures
            ]
    if not lines:
        return ""
    head = ["\n## Measured here\n", "| what | figure | record |", "|---|---|---|"]
    return "\n".join([*head, *lines, ""])


def _of(records: Records, key: str) -> tuple[list[Path], list[Any]]:
    found = records.get(key, [])
    return [path for path, _ in found], [one for _, one in found]


def _links(paths: list[Path]) -> str:
    return ", ".join(f"[{path.stem}](../records/{path.parent.name}/{path.name})" for path in paths)
