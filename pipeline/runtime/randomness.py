"""Randomness as a function of (seed, purpose, step): nothing to save, the same on any number of workers."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, step: int) -> np.random.Generator:
    """A generator that depends on its arguments only; draw for the global batch and slice by worker."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step])))
