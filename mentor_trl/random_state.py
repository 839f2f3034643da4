"""Random states of a process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave every random state as it was found: loading an expert must not change what the policy samples."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def rng_state() -> tuple:
    """Random states of Python, NumPy, and torch on the CPU and on CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_rng_state(state: tuple) -> None:
    """Set what [`rng_state`] returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
