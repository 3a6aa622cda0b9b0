"""CPU settings of a training process: threads, and reuse of the memory that each step frees."""

import ctypes
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)
MAX_FREE = 2**31 - 1  # bytes of freed memory that the process keeps at most


def use(threads: int | None) -> None:
    """Set the number of CPU threads (None: unchanged) and keep freed memory in the process."""
    if threads is not None:
        torch.set_num_threads(threads)
    _keep_freed_memory()


@cache
def _keep_freed_memory() -> None:
    """Reuse the memory of gradients and activations from step to step.

    By default glibc returns it to the system at every step, and the kernel clears every page of it again: 13,000 pages
    a step with the paper's TCGA networks (5 % of its time), 57,000 with a stack of two (10 %). No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)  # no block gets its own mapping, which free() would unmap
        mallopt(TRIM_THRESHOLD, MAX_FREE)
