"""Small dense tasks, whose images show one symbol a cell: what the probes of mechanisms ask.

Each task shows symbols on a grid of `SIDE * SIDE` cells and asks some of the cells for one of
`VALUES` values, so that chance is 0.25. Associative recall does the same for language models
("Zoology", https://arxiv.org/abs/2312.04927).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE = 16
VALUES = 4
CHANCE = 1 / VALUES
KEY_BITS = 16
# A key, the value as one-hot, and a mark of the cells that ask.
CHANNELS = KEY_BITS + VALUES + 1
_CELLS = SIDE * SIDE
_NOISE = 0.3
_TOGETHER = 16
_EVALUATION_SEED = 2**31
_REGION_KEYS = 4
# The lead of the most frequent colour: at first, and the share of the training in which it falls.
_EASY_LEAD, _EASY_UNTIL = 0.6, 0.6


@dataclass(frozen=True)
class Images:
    """Images of a task.

    Attributes:
        cells: (B, SIDE * SIDE, CHANNELS), float.
        answers: (B, SIDE * SIDE), the value of each cell that asks, -1 elsewhere.
    """

    cells: Tensor
    answers: Tensor


Draw = Callable[[int, int, torch.Generator, float], Images]
"""Level, number of images, source of chance, and how much of the training is over (0 to 1)."""


@dataclass(frozen=True)
class Task:
    """A task in several levels.

    Attributes:
        asks: what it asks of a mechanism, in a word.
        about: what it shows and asks, in a sentence.
        level: what its levels count.
        levels: from easy to hard.
        draw: images of a level.
        steps: of a training.
        easy: the share of these that shows the first level alone, without which it is not learnt
            in this time; the other steps show all levels in turn.
    """

    asks: str
    about: str
    level: str
    levels: tuple[int, ...]
    draw: Draw
    steps: int
    easy: float = 0.0

    def batches(self, size: int, *, steps: int, generator: torch.Generator) -> Iterator[Images]:
        """Draw the images of a training, `size` for each of `steps`.

        Several steps are drawn at once, since an image costs less so.
        """
        for first in range(0, steps, _TOGETHER):
            count = min(_TOGETHER, steps - first)
            numbers = range(first * size, (first + count) * size)
            turns = [
                0 if number < self.easy * steps * size else number % len(self.levels)
                for number in numbers
            ]
            cells = torch.empty(len(turns), _CELLS, CHANNELS)
            answers = torch.empty(len(turns), _CELLS, dtype=torch.long)
            for turn, level in enumerate(self.levels):
                places = [place for place, other in enumerate(turns) if other == turn]
                if places:
                    drawn = self.draw(level, len(places), generator, first / steps)
                    cells[places], answers[places] = drawn.cells, drawn.answers
            yield from map(Images, cells.split(size), answers.split(size))

    def evaluation(self, level: int, images: int) -> Images:
        """Draw the images that every mechanism is evaluated on."""
        generator = torch.Generator().manual_seed(_EVALUATION_SEED + level)
        return self.draw(level, images, generator, 1.0)


def _bound(keys: int, groups: int, cells: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw `groups` of cells with `keys` bindings each.

    Half of the cells show a key and its value, every key as often as any other as far as that goes;
    the others show a key that is drawn at random, and ask for its value.

    Returns:
        Of each cell `bits` (groups, cells, KEY_BITS), `value`, `asks` and `key`, (groups, cells).
    """
    bits = torch.randint(0, 2, (groups, keys, KEY_BITS), generator=generator) * 2.0 - 1.0
    values = torch.randint(0, VALUES, (groups, keys), generator=generator)
    shown = cells // 2
    place = torch.rand(groups, cells, generator=generator).argsort(dim=1)
    turns = torch.arange(shown).remainder(keys).expand(groups, -1)
    asked = torch.randint(0, keys, (groups, cells - shown), generator=generator)
    key = torch.cat([turns, asked], dim=1).gather(1, place)
    return {
        "bits": bits.gather(1, key[..., None].expand(-1, -1, KEY_BITS)),
        "value": values.gather(1, key),
        "asks": place >= shown,
        "key": key,
    }


def _shown(bits: Tensor, value: Tensor, asks: Tensor) -> Images:
    """Images of cells (B, cells, …) as `_bound` returns them."""
    one_hot = nn.functional.one_hot(value, VALUES).masked_fill(asks[..., None], 0)
    cells = torch.cat([bits, one_hot, asks[..., None]], dim=-1)
    return Images(cells, value.masked_fill(~asks, -1))


def bind(level: int, images: int, generator: torch.Generator, _done: float) -> Images:
    """Draw images that bind `level` keys to values."""
    found = _bound(level, images, _CELLS, generator)
    del found["key"]
    return _shown(**found)


def bindup(level: int, images: int, generator: torch.Generator, _done: float) -> Images:
    """Draw images that bind `level` keys to values, with symbols of 2x2 cells and noise."""
    half = SIDE // 2
    found = _bound(level, images, half * half, generator)
    del found["key"]
    small = _shown(**found)
    cells, answers = (
        part.unflatten(1, (half, half))
        .repeat_interleave(2, dim=1)
        .repeat_interleave(2, dim=2)
        .flatten(1, 2)
        for part in (small.cells, small.answers)
    )
    return Images(cells + _NOISE * torch.randn(cells.shape, generator=generator), answers)


def regions(level: int, images: int, generator: torch.Generator, _done: float) -> Images:
    """Draw images of blocks of `level` cells a side at a random shift, with bindings of their own.

    A cell whose key is shown nowhere in what the border of the image leaves of its block does not
    ask.
    """
    keys = min(_REGION_KEYS, level * level // 2)
    across = SIDE // level + (level < SIDE)
    found = _bound(keys, images * across**2, level * level, generator)
    shift = torch.randint(0, level, (images, 2), generator=generator) * (level < SIDE)
    row, column = (shift[:, axis, None] + torch.arange(SIDE) for axis in (0, 1))
    row, column = row[:, :, None], column[:, None, :]
    block = (row // level) * across + column // level
    group = (torch.arange(images)[:, None, None] * across**2 + block).flatten(1)
    cell = ((row % level) * level + column % level).flatten(1)
    found = {name: part[group, cell] for name, part in found.items()}
    binding = group * keys + found.pop("key")
    times = torch.zeros(images * across**2 * keys)
    times = times.index_add(0, binding.flatten(), (~found["asks"]).flatten().float())
    shown = _shown(**found)
    return Images(shown.cells, shown.answers.masked_fill(times[binding] == 0, -1))


def majority(level: int, images: int, generator: torch.Generator, done: float) -> Images:
    """Draw images of four colours, the most frequent of which leads by `level` percent.

    During the first steps of a training it leads by more.
    """
    lead = level / 100
    lead = max(lead, _EASY_LEAD - (_EASY_LEAD - lead) * done / _EASY_UNTIL)
    few = round(_CELLS * (1 - lead) / VALUES)
    others = torch.arange(1, VALUES).repeat_interleave(few)
    colours = torch.cat([torch.zeros(_CELLS - len(others), dtype=torch.long), others])
    top = torch.randint(0, VALUES, (images, 1), generator=generator)
    order = torch.rand(images, _CELLS, generator=generator).argsort(dim=1)
    one_hot = nn.functional.one_hot((colours[order] + top).remainder(VALUES), VALUES)
    nothing, mark = torch.zeros(images, _CELLS, KEY_BITS), torch.ones(images, _CELLS, 1)
    return Images(torch.cat([nothing, one_hot, mark], dim=-1), top.expand(-1, _CELLS))


TASKS: Mapping[str, Task] = {
    "bind": Task(
        "capacity",
        "Keys are bound to values anew in each image; half of the cells show a key and its value,"
        " half show a key and must name its value. Levels: the number of keys.",
        "keys",
        (1, 2, 4, 8, 16, 32),
        bind,
        140,
    ),
    "regions": Task(
        "detail",
        "The same inside square blocks at a random shift, each with keys and values of its own."
        " Levels: the side of the blocks, in cells.",
        "side of a block",
        (16, 8, 4, 2),
        regions,
        140,
        0.4,
    ),
    "bindup": Task(
        "smooth content",
        "The first task with symbols of 2x2 cells and noise, which pooling may keep. Levels: the"
        " number of keys.",
        "keys",
        (1, 2, 4, 8),
        bindup,
        140,
    ),
    "majority": Task(
        "aggregation",
        "All cells must name the most frequent of four colours. Level: its lead, in percent of the"
        " cells. Where each cell names its own colour, 37 % are right.",
        "lead",
        (15,),
        majority,
        60,
    ),
}
"""The tasks by name."""
