"""Seeds of every random stream, as pure functions of its purpose. Nothing draws from a global generator."""

from hashlib import blake2b

import torch


def mix(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on their order."""
    return int.from_bytes(blake2b(ascii(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str, device: str = "cpu") -> torch.Generator:
    """A generator seeded with ``mix`` of the parts."""
    return torch.Generator(device=device).manual_seed(mix(*parts))
