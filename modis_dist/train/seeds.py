"""Seeds of all random streams, each a pure function of the stream's purpose. Global generators are never used."""

from hashlib import blake2b

import torch


def mix(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    return int.from_bytes(blake2b(ascii(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with ``mix`` of the parts."""
    return torch.Generator().manual_seed(mix(*parts))
