"""Turn errors of GPU, memory and disk during a training into one-line errors with a fix; decide what a crash is."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from modis_dist.config.run import Run
from modis_dist.runtime.errors import (
    DiskFailed,
    Interrupted,
    MachineFailed,
    ModisError,
    NodeFailed,
    RankLost,
    RunFailed,
)
from modis_dist.runtime.text import shown

GPU_ERROR = re.compile(r"CUDA (driver )?error|cu(BLAS|DNN|SOLVER|SPARSE|FFT)|NCCL|NVML|No CUDA GPUs", re.IGNORECASE)


@contextmanager
def machine_errors(folder: Path, run: Run, *, stacked: int = 1) -> Iterator[None]:
    """Turn an error of a GPU into ``NodeFailed``, and full memory of the machine or its GPU into ``RunFailed``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = shown(str(error).partition("\n")[0])
        if _is_gpu_error(error):
            advice = "rerun the same command to resume from the last checkpoint, on another GPU if it fails again"
            raise NodeFailed(f"{folder}: the GPU failed ({reason}); {advice}") from error
        if not _is_out_of_memory(error):
            raise
        size = f"optim.batch_size {run.optim.batch_size}" + f" and {stacked} trials in a stack" * (stacked > 1)
        setting = "optim.batch_size" + " or sweep.packing.max_trials" * (stacked > 1)
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


def is_crash(error: Exception, *, resubmittable: bool = False) -> bool:
    """Return whether an error is a crash of the pack whose training raised it, which fails its trials.

    Signals, lost ranks and failures of disk or machine are not. Full memory, data, configuration and bugs are, unless
    the pack can be submitted again with other resources (``resubmittable``): they would occur on every start here.
    """
    if isinstance(error, Interrupted | RankLost | DiskFailed | MachineFailed):
        return False
    computing = isinstance(error, RuntimeError | ValueError | ArithmeticError) and not isinstance(error, ModisError)
    return computing or not resubmittable


def _is_gpu_error(error: Exception) -> bool:
    """Return whether a GPU or its driver failed; full GPU memory does not count."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.AcceleratorError) or GPU_ERROR.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch raises torch.OutOfMemoryError for full GPU memory, but a plain RuntimeError for full host memory.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
