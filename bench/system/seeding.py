"""Random numbers of one seed, whichever library draws them."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch.

    Unlike Lightning's function of the name it takes seeds of 64 bits and leaves the environment.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
