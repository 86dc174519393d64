"""Values as they are written: YAML, and `key=value` of the command line."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from bench.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, neither 2020-01-02, 1:30 nor 010 is another; keys differ."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping none of whose keys is given twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        own: list[Any] = []
        for key, _ in node.value:
            if key.value in own:
                raise yaml.composer.ComposerError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            own.append(key.value)
        return node


_OTHERWISE = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "float", "int"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$"
        r"|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def read(text: str, word: str | None = None) -> Any:
    """Return the value that a text stands for: a number, true, null, text, a list or a mapping.

    Args:
        text: YAML.
        word: what it is a part of, for the error.

    Raises:
        InputError: for malformed YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        line = f", near line {mark.line + 1}" if mark and "\n" in text else ""
        raise InputError(f"cannot read {word or text!r}: {where}{line}") from error


def assigned(words: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=3", "seed=1"]` -> {"train": {"steps": 3}, "seed": 1}.

    Raises:
        InputError: for a word that is not of this form, and one that contradicts another.
    """
    result: dict[str, Any] = {}
    for word in words:
        if not re.fullmatch(r"\w+(\.\w+)*=.*", word, flags=re.DOTALL):
            raise InputError(f"{word!r} is not of the form key=value, for example train.steps=100")
        path, _, text = word.partition("=")
        if not text.strip():
            # As of a variable of the shell that is not set.
            raise InputError(f"{word!r} has no value; null stands for none")
        if re.search(r"(?:^|\s)#", re.sub(r"'[^']*'|\"[^\"]*\"", "", text)):
            raise InputError(f"cannot read {word!r}: # begins a comment; quote the value in YAML")
        result = merged([result, nested(path, read(text, word))], agree="")
    return result


def nested(path: str, value: Any) -> dict[str, Any]:
    """`"train.steps", 3` -> {"train": {"steps": 3}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    found: dict[str, Any] = value
    return found


def merged(layers: Iterable[Mapping[str, Any]], *, agree: str | None = None) -> dict[str, Any]:
    """Return nested mappings as one; the values of later ones win, and lists count as values.

    Args:
        layers: the mappings.
        agree: what their names begin with, where none may have another value than one before it.

    Raises:
        InputError: where one has.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            if isinstance(value, Mapping) and (
                agree is None or isinstance(result.get(key, {}), Mapping)
            ):
                within = None if agree is None else f"{agree}{key}."
                value = merged([below if isinstance(below, Mapping) else {}, value], agree=within)
            elif agree is not None and key in result and below != value:
                raise InputError(f"{agree}{key} is given twice, as {below!r} and {value!r}")
            result[key] = value
    return result


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train": {"steps": 3}, "seed": 1}` -> {"train.steps": 3, "seed": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            result[key] = value
    return result


def shown(value: Any) -> str:
    """Return a value as a person would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value) if isinstance(value, tuple) else value)
