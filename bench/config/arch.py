"""ARCH strings: the published one-line description of a multi-scale backbone.

`l1,h3,d96,n1,s1,g1,p4,f7,a0_l2,…`: one stage between underscores; see `StageSpec` for the letters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTERS = {
    "l": "stage number",
    "h": "heads",
    "d": "dim",
    "n": "blocks",
    "s": "1 = the chosen mechanism, 0 = full attention",
    "g": "global tokens",
    "p": "patch size",
    "f": "the mechanism's parameter",
    "a": "1 = absolute positions, 0 = relative",
}
_DEFAULTS = {"h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1}
_SWITCHES = ("s", "a")
_MAY_BE_ZERO = ("s", "a", "g")
_STAGES = (3, 4)
DENSE = "full"


@dataclass(frozen=True)
class StageSpec:
    """One stage of a backbone.

    Attributes:
        number: 1 for the first stage.
        heads: attention heads.
        dim: channels.
        blocks: pairs of an attention and an MLP block.
        attention: mechanism of the stage.
        num_global: global tokens.
        patch: side of the patches of the stage's input.
        feature: the mechanism's parameter (window, features, reduction).
        absolute: absolute positions, else relative ones.
        dense: blocks, from 0, that have full attention instead.
    """

    number: int
    heads: int
    dim: int
    blocks: int
    attention: str
    num_global: int
    patch: int
    feature: int
    absolute: bool
    dense: tuple[int, ...] = ()

    def mechanism(self, block: int) -> str:
        """The mechanism of a block, from 0."""
        return DENSE if block in self.dense else self.attention

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The mechanisms of all blocks, each once."""
        return tuple(dict.fromkeys(map(self.mechanism, range(self.blocks))))

    @property
    def position(self) -> str:
        """ "absolute" or "relative"."""
        return "absolute" if self.absolute else "relative"


def _error(arch: str, start: int, end: int, message: str) -> ValueError:
    shown = f"{arch[:start]}>>>{arch[start:end]}<<<{arch[end:]}"
    return ValueError(f"ARCH, character {start + 1}: {message}, at {shown!r}")


def parse(
    arch: str,
    attention: str | Sequence[str] = "longformer",
    dense: Mapping[int, Sequence[int]] | None = None,
) -> tuple[StageSpec, ...]:
    """Read an ARCH string.

    Args:
        arch: the string, of three or four stages.
        attention: the mechanism of the stages with `s1`; or one for each stage, in a list or
            comma-separated.
        dense: blocks that have full attention instead, counted from 0, by stage, counted from 1.

    Raises:
        ValueError: pointing at the character that is wrong, between `>>>` and `<<<`; or for a stage
            or block in `dense` that is not there.
    """
    texts = arch.split("_")
    if len(texts) not in _STAGES:
        raise _error(arch, 0, len(arch), f"{len(texts)} stages, where 3 or 4 are allowed")
    mixes = attention.split(",") if isinstance(attention, str) else list(attention)
    if len(mixes) == 1:
        mixes *= len(texts)
    if len(mixes) != len(texts):
        raise ValueError(f"{len(mixes)} mechanisms ({', '.join(mixes)}) for {len(texts)} stages")
    dense = dense or {}
    for number in dense:
        if not 1 <= number <= len(texts):
            raise ValueError(f"dense: stage {number} is not one of the stages 1 to {len(texts)}")
    stages, at = [], 0
    for expected, (text, mechanism) in enumerate(zip(texts, mixes, strict=True), start=1):
        values = _parse_stage(arch, at, text, expected)
        stages.append(
            StageSpec(
                number=expected,
                heads=values["h"],
                dim=values["d"],
                blocks=values["n"],
                attention=mechanism if values["s"] else DENSE,
                num_global=values["g"],
                patch=values["p"],
                feature=values["f"],
                absolute=bool(values["a"]),
                dense=tuple(sorted({*dense.get(expected, ())})),
            )
        )
        for block in stages[-1].dense:
            if not 0 <= block < values["n"]:
                raise ValueError(
                    f"dense: block {block} of stage {expected} is not one of its blocks 0 to"
                    f" {values['n'] - 1}"
                )
        at += len(text) + 1
    return tuple(stages)


def _parse_stage(arch: str, at: int, text: str, expected: int) -> dict[str, int]:
    values: dict[str, int] = {}
    stage = at, at + len(text)
    for field in text.split(","):
        end = at + len(field)
        letter, digits = field[:1], field[1:]
        if letter not in LETTERS:
            known = ", ".join(f"{key} ({meaning})" for key, meaning in LETTERS.items())
            raise _error(arch, at, end, f"{letter!r} is not one of the letters {known}")
        if letter in values:
            raise _error(arch, at, end, f"{letter!r} stands twice in one stage")
        if not digits.isascii() or not digits.isdigit():
            raise _error(arch, at, end, f"{letter!r} ({LETTERS[letter]}) needs a whole number")
        value = int(digits)
        if letter in _SWITCHES and value > 1:
            raise _error(arch, at, end, f"{letter!r} is 0 or 1")
        if value == 0 and letter not in _MAY_BE_ZERO:
            raise _error(arch, at, end, f"{letter!r} ({LETTERS[letter]}) must be positive")
        if letter == "l" and value != expected:
            raise _error(arch, at, end, f"stage {expected} was expected here")
        values[letter] = value
        at = end + 1
    merged = _DEFAULTS | values
    if merged["d"] % merged["h"]:
        raise _error(arch, *stage, f"d{merged['d']} must be a multiple of h{merged['h']}")
    if merged["a"] and merged["d"] % 2:
        raise _error(arch, *stage, f"absolute positions need an even d, got d{merged['d']}")
    return merged


def render(stages: Sequence[StageSpec]) -> str:
    """Write stages as an ARCH string: the inverse of `parse`."""
    return "_".join(
        f"l{s.number},h{s.heads},d{s.dim},n{s.blocks},s{int(s.attention != DENSE)},g{s.num_global},"
        f"p{s.patch},f{s.feature},a{int(s.absolute)}"
        for s in stages
    )
