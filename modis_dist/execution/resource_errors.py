"""Turn errors of GPU, memory and disk during a training into one-line errors with a fix; decide what a crash is."""

import errno
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
OUT_OF_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
FILE_ADVICE = {
    None: "free disk space or repair the disk",  # errors of libraries
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space or raise the quota",
    errno.EIO: "repair the disk",
    errno.ESTALE: "mount the file system again",
    errno.EROFS: "make the file system writable",
    errno.ENOENT: "restore the file or folder",
    errno.EACCES: "restore the permissions",
    errno.EPERM: "restore the permissions",
}


@contextmanager
def machine_errors(folder: Path, run: Run, *, stacked: int = 1) -> Iterator[None]:
    """Turn a failure of a GPU into ``NodeFailed``, and an out-of-memory error of host or GPU into ``RunFailed``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = shown(str(error).partition("\n")[0])
        if _is_out_of_memory(error):
            size = f"optim.batch_size {run.optim.batch_size}" + f" and {stacked} trials in a stack" * (stacked > 1)
            setting = "optim.batch_size" + " or sweep.packing.max_trials" * (stacked > 1)
            raise RunFailed(
                f"{folder}: out of memory with {size}; lower {setting} or use a larger machine ({reason})"
            ) from error
        if _is_gpu_error(error):
            advice = "rerun the same command to resume from the last checkpoint, on another GPU if it fails again"
            raise NodeFailed(f"{folder}: the GPU failed ({reason}); {advice}") from error
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of a file system, such as a full disk, into ``DiskFailed`` with a fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in FILE_ADVICE or isinstance(error, ConnectionError | TimeoutError):
            raise
        location = shown(str(error.filename)) if error.filename else folder
        advice = f"{FILE_ADVICE[error.errno]}, then rerun the same command"
        raise DiskFailed(f"{location}: {error.strerror or error}; {advice}") from error


def is_crash(error: Exception, *, resubmittable: bool = False) -> bool:
    """Return whether an error is a crash of the pack whose training raised it, which fails its trials.

    Signals, lost ranks and failures of disk or machine are not. Errors of the computation always are. Out of memory,
    errors of data or configuration and bugs would occur on every start here, so they are as well, unless the pack can
    be submitted again with other resources (``resubmittable``).
    """
    if isinstance(error, Interrupted | RankLost | DiskFailed | MachineFailed):
        return False
    computing = isinstance(error, RuntimeError | ValueError | ArithmeticError) and not isinstance(error, ModisError)
    return computing or not resubmittable


def _is_gpu_error(error: Exception) -> bool:
    return isinstance(error, torch.AcceleratorError) or GPU_ERROR.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    # The allocators of PyTorch raise torch.OutOfMemoryError for GPUs, but RuntimeError for the host; so do libraries.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)) is not None
