"""How a process that trains uses its processor: threads, and memory that stays when a step frees it."""

import ctypes
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3)
LARGEST = 32 * 2**20  # bytes; glibc takes no more. What is larger goes back to the system when it is freed
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
    pages a step, a twentieth of its time, with the paper's TCGA networks. Other C libraries than glibc are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, FREE_AT_TOP)
