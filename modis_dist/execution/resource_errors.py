"""Turn memory and disk errors during a training into one-line errors with a fix."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modis_dist.config.run import Run
from modis_dist.runtime.errors import DiskFailed, ModisError, RunFailed
from modis_dist.runtime.text import shown

GPU_ERROR = re.compile(r"CUDA (driver )?error|cu(BLAS|DNN|SOLVER|SPARSE|FFT)|NCCL|NVML|No CUDA GPUs", re.IGNORECASE)


@contextmanager
def memory_errors(folder: Path, run: Run, *, stacked: int = 1) -> Iterator[None]:
    """Turn an out-of-memory error of the machine or its GPU into ``RunFailed`` with a fix."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        size = f"optim.batch_size {run.optim.batch_size}" + f" and {stacked} trials in a stack" * (stacked > 1)
        setting = "optim.batch_size" + " or sweep.packing.max_trials" * (stacked > 1)
        reason = shown(str(error).partition("\n")[0])
        raise RunFailed(
            f"{folder}: out of memory with {size}; lower {setting} or use a larger machine ({reason})"
        ) from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of a full or failing disk into ``DiskFailed`` with a fix."""
    try:
        yield
    except (ConnectionError, TimeoutError):  # of a network, not of a disk
        raise
    except OSError as error:
        location = shown(str(error.filename)) if error.filename else folder
        reason = error.strerror or error
        advice = "free disk space or repair the disk, then rerun the same command"
        raise DiskFailed(f"{location}: {reason}; {advice}") from error


def is_training_error(error: Exception) -> bool:
    """Return whether an error comes from the computation, so that a single member may have crashed its stack.

    Errors of machine, disk, data or configuration would also occur if the members were trained one by one.
    """
    computing = isinstance(error, RuntimeError | ValueError | ArithmeticError) and not isinstance(error, ModisError)
    return computing and not _is_out_of_memory(error) and not is_gpu_error(error)


def is_gpu_error(error: Exception) -> bool:
    """Return whether a GPU or its driver failed; full GPU memory does not count."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or GPU_ERROR.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch raises torch.OutOfMemoryError for full GPU memory, but a plain RuntimeError for full host memory.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
