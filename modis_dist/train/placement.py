"""Where features are kept while a training runs: in memory or on a disk, on the device or beside it.

No answer changes a result: what is kept elsewhere is the same, and comes in the same batches.
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

SHARE = 0.4  # of the memory there is that features may take; the rest is for models, other trainings and the system
SHARE_OF_DEVICE = 0.5  # of what is free there; the rest is for gradients, moments and intermediate results
VALUES_AT_ONCE = 1 << 24  # of features that pass through the networks without learning; 64 MiB
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_GROUPS = Path("/proc/self/cgroup")
HOST = torch.device("cpu")


# --- memory or disk -----------------------------------------------------------------------------------------


def storage_of(run: Run, store: Store, *, kinds: int = 1, limit: int | None = None) -> FeatureStorage:
    """Where the features of trainings on so many ``kinds`` of data of a run's store are kept.

    ``limit``: bytes of memory where they are trained; None on this machine.
    """
    needed = resident_bytes(run, store, kinds=kinds)
    return choose_storage(run.trainer.feature_storage, needed, limit=memory_limit() if limit is None else limit)


def choose_storage(asked: Literal["auto", "memory", "disk"], needed: int, *, limit: int) -> FeatureStorage:
    """Where features are kept that take ``needed`` bytes of the ``limit`` there is."""
    if asked != "auto":
        return asked
    return "memory" if needed <= SHARE * limit else "disk"


def resident_bytes(run: Run, store: Store, *, kinds: int = 1) -> int:
    """Bytes of features in memory, if all are kept there; preprocessing is taken to drop none."""
    named = run.data.modalities or store.modalities
    values = sum(store.rows(m) * len(store.features(m)) for m in named if m in store.modalities)
    copies = 2 + kinds  # as read, for the baseline or on the way to a GPU, prepared
    return copies * values * BYTES_PER_VALUE * run.trainer.workers  # each has its own; all may share this machine


def memory_limit() -> int:
    """Bytes that this process and its children may have: the machine's, or less where a job is held to less."""
    limits = [psutil.virtual_memory().total]
    for line in _lines(PROCESS_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, file = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        folder = root / path.strip("/")
        above = [held for held in (folder, *folder.parents) if held.is_relative_to(root)]
        limits += [int(said) for held in above for said in _lines(held / file) if said.isdigit()]
    return int(min(limits))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # not with this kernel


# --- device or host -----------------------------------------------------------------------------------------


def storage_device(needed: int, device: torch.device) -> torch.device:
    """Where ``needed`` bytes of features wait for their turn on a device: there, or in the memory of the host."""
    if device.type != "cuda" or fits_beside_training(needed, free=_free_bytes(device)):
        return device
    return HOST


def fits_beside_training(needed: int, *, free: int) -> bool:
    """Whether features may stay on a device that has so many bytes free when the model is there already."""
    return needed <= SHARE_OF_DEVICE * free


def _free_bytes(device: torch.device) -> int:
    """What the system has, and what PyTorch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def gather_to_device(x: Sequence[Tensor], rows: Tensor, *, device: torch.device) -> Tensor:
    """Rows [r, b, p] on the device of r arrays on the host, by positions ``rows`` [r, b] on the host.

    The copy to a GPU starts here and is not waited for.
    """
    size = (*rows.shape, x[0].shape[1])
    batch = torch.empty(size, dtype=x[0].dtype, pin_memory=device.type == "cuda")
    for place, held, wanted in zip(batch, x, rows, strict=True):
        torch.index_select(held, 0, wanted, out=place)
    return batch.to(device, non_blocking=True)


def rows_at_once(features: int, *, most: int) -> int:
    """How many rows of so many features pass through the networks at once."""
    return max(64, min(most, VALUES_AT_ONCE // features))
