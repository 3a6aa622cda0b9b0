"""What a machine refuses in the middle of a training, turned into one line that says what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modis_dist.config.run import Run
from modis_dist.runtime.errors import DiskFailed, ModisError, RunFailed, shown

OF_GPU = re.compile(r"CUDA (driver )?error|cu(BLAS|DNN|SOLVER|SPARSE|FFT)|NCCL|NVML|No CUDA GPUs", re.IGNORECASE)


@contextmanager
def enough_memory(folder: Path, run: Run, *, stacked: int = 1) -> Iterator[None]:
    """Turn what a machine without memory raises into ``RunFailed`` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        size = f"optim.batch_size {run.optim.batch_size}" + f" and {stacked} trials in a stack" * (stacked > 1)
        smaller = "lower it" + " or sweep.packing.max_trials" * (stacked > 1)
        why = shown(str(error).partition("\n")[0])
        raise RunFailed(f"{folder}: out of memory with {size}; {smaller}, or take a larger machine ({why})") from error


@contextmanager
def sound_disk(folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises into ``DiskFailed`` that says what to do."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # no disk's
        raise
    except OSError as error:
        where = shown(str(error.filename)) if error.filename else folder
        why = error.strerror or error
        raise DiskFailed(f"{where}: {why}; make room or mend the disk, then the same command continues") from error


def is_of_training(error: Exception) -> bool:
    """Whether an error is one of computing, which one member may have brought upon its stack.

    What machine, disk, data or configuration cause is not: it would meet the stack's members one by one as well.
    """
    computing = isinstance(error, RuntimeError | ValueError | ArithmeticError) and not isinstance(error, ModisError)
    return computing and not _out_of_memory(error) and not is_of_gpu(error)


def is_of_gpu(error: Exception) -> bool:
    """Whether a GPU or its driver failed; that it is full is no failure of its own."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or OF_GPU.search(str(error)) is not None


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has a type for a GPU that is full, and only words for a machine that is."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
