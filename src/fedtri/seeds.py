"""One way to derive every seed of a run: a hash of the run's seed and what the number is for."""

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`, e.g. ("batches", round, client). Stable across machines and Python versions."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded for `purpose`: what it draws does not depend on the device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
