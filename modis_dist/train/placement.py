"""Storage of features during a training: in memory or on disk, on the device or on the host.

No choice changes a result: values and batches are the same.
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

SHARE = 0.4  # of the memory limit that features may take; the rest is for models, other trainings and the system
SHARE_OF_DEVICE = 0.5  # of free device memory; the rest is for gradients, moments and activations
VALUES_AT_ONCE = 1 << 24  # feature values in one inference pass; 64 MiB
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_GROUPS = Path("/proc/self/cgroup")
HOST = torch.device("cpu")


# --- memory or disk -----------------------------------------------------------------------------------------


def storage_of(run: Run, store: Store, *, kinds: int = 1, limit: int | None = None) -> FeatureStorage:
    """Storage for the features of trainings on ``kinds`` different preparations of a run's store.

    ``limit``: bytes of memory of the machine that trains; by default this one.
    """
    needed = resident_bytes(run, store, kinds=kinds)
    return choose_storage(run.trainer.feature_storage, needed, limit=memory_limit() if limit is None else limit)


def choose_storage(asked: Literal["auto", "memory", "disk"], needed: int, *, limit: int) -> FeatureStorage:
    """Storage for features of ``needed`` bytes within a memory ``limit``."""
    if asked != "auto":
        return asked
    return "memory" if needed <= SHARE * limit else "disk"


def resident_bytes(run: Run, store: Store, *, kinds: int = 1) -> int:
    """Bytes of all features in memory, assuming that preprocessing drops none."""
    named = run.data.modalities or store.modalities
    values = sum(store.rows(m) * len(store.features(m)) for m in named if m in store.modalities)
    copies = 2 + kinds  # raw, for the baseline or on the way to a GPU, prepared
    return copies * values * BYTES_PER_VALUE * run.trainer.workers  # each worker has copies; all may share this machine


def memory_limit() -> int:
    """Memory limit in bytes of this process and its children: the machine's, or that of its cgroups."""
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
        return []  # not with this kernel


# --- device or host -----------------------------------------------------------------------------------------


def storage_device(needed: int, device: torch.device) -> torch.device:
    """Device that stores ``needed`` bytes of features of a training on ``device``: the same, or the host."""
    if device.type != "cuda" or fits_beside_training(needed, free=_free_bytes(device)):
        return device
    return HOST


def fits_beside_training(needed: int, *, free: int) -> bool:
    """Return whether features fit on a device with ``free`` bytes beside the model."""
    return needed <= SHARE_OF_DEVICE * free


def _free_bytes(device: torch.device) -> int:
    """Free device memory and what PyTorch has reserved but not allocated."""
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


def rows_at_once(features: int, *, most: int) -> int:
    """Number of rows with ``features`` features in one inference pass."""
    return max(64, min(most, VALUES_AT_ONCE // features))
