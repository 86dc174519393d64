"""Mechanisms of a user, in files."""

import textwrap
from pathlib import Path

_MINE = """\
import os, signal, time
import torch
from torch import nn
{imports}

class Mine(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.dim, self.num_global = dim, num_global
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
{does}
        return self.proj(x)
"""


def write(file: Path, does: str = "", imports: str = "") -> str:
    """Write a mechanism of one linear layer that first does something; return what it is called."""
    file.write_text(_MINE.format(imports=imports, does=textwrap.indent(does, " " * 8)))
    return f"{file}:Mine"
