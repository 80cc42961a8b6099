"""Derives every seed of a run: a hash of the run's seed and of the purpose of the number."""

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`, e.g. ("batches", round, client). The same on every machine and Python version."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator seeded for `purpose`. It draws on the CPU, so its numbers do not depend on the training device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
