"""How a process that trains uses its processor: threads, and memory that stays when a step frees it."""

import ctypes
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)
FREE_AT_TOP = 2**31 - 1  # bytes that may lie free


def use(threads: int | None) -> None:
    """Train on so many CPU threads, or as many as before where None."""
    if threads is not None:
        torch.set_num_threads(threads)
    _keep_freed_memory()


@cache
def _keep_freed_memory() -> None:
    """Have gradients and activations find the memory of the step before.

    By default it goes back to the system at every step and comes again page by page, each cleared by the kernel: 13,000
    pages a step, a twentieth of its time, with the paper's TCGA networks, 57,000 and a tenth with two replicates of
    them. Other C libraries than glibc are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # nothing is mapped by itself, however large, or it would be unmapped when it is freed
        mallopt(TRIM_THRESHOLD, FREE_AT_TOP)
