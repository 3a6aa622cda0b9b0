"""Storage of features during a training: in memory or on disk, on the device or on the host.

Results do not depend on the choice: values and batches are identical.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from modis_dist.config.run import Run
from modis_dist.data.store.arrays import BYTES_PER_VALUE, FeatureStorage
from modis_dist.data.store.reader import Store

FEATURES_FRACTION = 0.4  # of the memory limit, for features; the rest is for models, other trainings and the system
SHARE_OF_DEVICE = 0.5  # of free device memory, for features; the rest is for gradients, moments and activations
VALUES_AT_ONCE = 1 << 24  # feature values in one inference pass; 64 MiB
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_GROUPS = Path("/proc/self/cgroup")
HOST = torch.device("cpu")


# --- memory or disk -----------------------------------------------------------------------------------------


def storage_of(run: Run, store: Store, *, kinds: int = 1, limit: int | None = None) -> FeatureStorage:
    """Return the storage for features of ``kinds`` different preparations of a run's store.

    ``limit``: memory of the training machine in bytes; default: that of this machine.
    """
    needed = resident_bytes(run, store, kinds=kinds)
    return choose_storage(run.trainer.feature_storage, needed, limit=memory_limit() if limit is None else limit)


def choose_storage(setting: Literal["auto", "memory", "disk"], needed: int, *, limit: int) -> FeatureStorage:
    """Return the storage for features of ``needed`` bytes within a memory ``limit``."""
    if setting != "auto":
        return setting
    return "memory" if needed <= FEATURES_FRACTION * limit else "disk"


def resident_bytes(run: Run, store: Store, *, kinds: int = 1) -> int:
    """Return the bytes of all features in memory, assuming that preprocessing drops none."""
    named = run.data.modalities or store.modalities
    values = sum(store.rows(m) * len(store.features(m)) for m in named if m in store.modalities)
    copies = 2 + kinds  # raw; for the baseline or in transfer to a GPU; prepared
    return copies * values * BYTES_PER_VALUE * run.trainer.workers  # each worker has copies; all may share this machine


def memory_limit() -> int:
    """Return the memory limit of this process and its children in bytes: the machine's memory or a cgroup limit."""
    limits = [psutil.virtual_memory().total]
    for line in _lines(PROCESS_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        folder = root / path.strip("/")
        groups = [group for group in (folder, *folder.parents) if group.is_relative_to(root)]
        limits += [int(line) for group in groups for line in _lines(group / file) if line.isdigit()]
    return int(min(limits))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # the kernel has no such file


# --- device or host -----------------------------------------------------------------------------------------


def storage_device(needed: int, device: torch.device) -> torch.device:
    """Return the device to store ``needed`` bytes of features of a training on ``device``: the same, or the host."""
    if device.type != "cuda" or fits_beside_training(needed, free=_free_bytes(device)):
        return device
    return HOST


def fits_beside_training(needed: int, *, free: int) -> bool:
    """Return True if features of ``needed`` bytes and the model fit on a device with ``free`` bytes."""
    return needed <= SHARE_OF_DEVICE * free


def _free_bytes(device: torch.device) -> int:
    """Return the free device memory, including that reserved but not allocated by PyTorch."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def gather_to_device(x: Sequence[Tensor], rows: Tensor, *, device: torch.device) -> Tensor:
    """Gather rows [r, b, p] of r host arrays, at positions ``rows`` [r, b] on the host, to the device.

    The copy to a GPU is asynchronous.
    """
    size = (*rows.shape, x[0].shape[1])
    batch = torch.empty(size, dtype=x[0].dtype, pin_memory=device.type == "cuda")
    for out, features, positions in zip(batch, x, rows, strict=True):
        torch.index_select(features, 0, positions, out=out)
    return batch.to(device, non_blocking=True)


def rows_at_once(features: int, *, max_rows: int) -> int:
    """Return the number of rows with ``features`` features in one inference pass."""
    return max(64, min(max_rows, VALUES_AT_ONCE // features))
