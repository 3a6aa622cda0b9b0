"""How much memory a pack takes and how many packs fit at once: measured, where a rough count says that it may matter.

A pack is tried in a process of its own, which reads its data, trains a few steps and saves. It is compared with all the
memory this machine or job has, not with what is free at the moment: the same study is to be shared out in the same way
whenever it is started.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from modis_dist.data.store import Store
from modis_dist.errors import Interrupted, ModisError
from modis_dist.files import clear_leftovers
from modis_dist.model.networks import Modis, Shape
from modis_dist.sweep.execute import Pack, chosen_device, run_pack
from modis_dist.train.ports import NullReporter
from modis_dist.train.prepare import build_shape, data_key

STEPS = 3  # that are tried
MARGIN = 1.25  # of what was measured, for validation and judging
SHARE = 0.8  # of the memory there is; the rest is the driver's, Ray's and the system's
DOUBT = 3  # a rough count that fits so many times is not measured
PROCESS = 700 * 2**20  # bytes of Python with torch
CONTEXT = 600 * 2**20  # bytes that CUDA takes in every process
COPIES_OF_MODEL = 7  # parameters, gradients, two moments, the best so far, what is written, its buffer
BYTES_PER_NUMBER = 4
CGROUPS = Path("/sys/fs/cgroup")
PROCESS_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Footprint:
    """Bytes that the process of a pack takes, of the machine and of its GPU, and all that this GPU has."""

    host: int
    gpu: int = 0
    gpu_total: int = 0


@dataclass(frozen=True)
class Room:
    """How many packs are trained at once, at most, and how many on one GPU."""

    packs: int
    per_gpu: int = 1


def fitting(
    packs: Sequence[Pack], wanted: Room, *, workers: int, threads: int, out: Path, store: Path, nodes: int = 1
) -> Room:
    """As many of the packs at once as wanted, or as few as fit where every one has so many workers.

    Of several nodes all are taken to have the memory of this one. Where less than wanted fit, a warning says so.
    """
    if wanted == Room(1, 1):
        return wanted
    held, limit = Store.open(store), SHARE * memory_limit() * nodes
    largest = max(packs, key=lambda pack: rough(pack, held))
    if DOUBT * wanted.packs * workers * rough(largest, held) <= limit and wanted.per_gpu == 1:
        return wanted
    found = measured(largest, threads=threads, out=out, store=store)
    if found is None:
        logging.getLogger(__name__).warning("a pack could not be tried for its memory; one is trained at a time")
        return Room(1, 1)
    fit = Room(
        max(1, min(wanted.packs, int(limit / (found.host * workers)))),
        max(1, min(wanted.per_gpu, int(SHARE * found.gpu_total / found.gpu))) if found.gpu else wanted.per_gpu,
    )
    if fit != wanted:
        logging.getLogger(__name__).warning("%s", _told(found, fit, wanted, workers=workers, limit=limit))
    return fit


def _told(found: Footprint, fit: Room, wanted: Room, *, workers: int, limit: float) -> str:
    takes = f"a pack takes {found.host * workers / 1e9:.1f} GB of memory"
    has = f"packs may have {limit / 1e9:.1f} GB"
    if fit.per_gpu < wanted.per_gpu:
        takes += f" and {found.gpu / 1e9:.1f} GB of its GPU"
        has += f" and {SHARE * found.gpu_total / 1e9:.1f} GB, {fit.per_gpu} of {wanted.per_gpu} fit on a GPU"
    return f"{takes} (measured), {has}: {fit.packs} at a time instead of {wanted.packs}"


def measured(pack: Pack, *, threads: int, out: Path, store: Path) -> Footprint | None:
    """What a pack takes, by trying it below ``out``; None where the trial fails, as the pack itself then will."""
    clear_leftovers(out)
    with (
        TemporaryDirectory(dir=out, prefix=".probe-", suffix=".tmp") as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        try:
            taken = process.submit(_tried, pack, threads, Path(folder), store).result()
        except (BrokenProcessPool, ModisError):
            return None
    # The best model so far is kept from the first validation on.
    best = model_bytes(_shape(pack, Store.open(store)), replicates=len(pack.trials))
    if taken.gpu:
        return Footprint(int(MARGIN * taken.host), int(MARGIN * (taken.gpu + best)) + CONTEXT, taken.gpu_total)
    return Footprint(int(MARGIN * (taken.host + best)))


def _tried(pack: Pack, threads: int, out: Path, store: Path) -> Footprint:
    """In the process: the peak of reading, preparing, a few steps and a checkpoint."""
    torch.set_num_threads(threads)
    with suppress(Interrupted):
        run_pack(pack, out=out, store=store, reporter=NullReporter(), stop=AfterSteps(STEPS))
    host = _peak_of_this_process()
    device = chosen_device(pack.trials[0].run)
    if device.type != "cuda":
        return Footprint(host)
    return Footprint(host, torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1])


class AfterSteps:
    """A stop port that asks for the end after some steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def requested(self) -> str | None:
        """Why to stop, or None."""
        self._left -= 1
        return None if self._left > 0 else "enough is known"


def _peak_of_this_process() -> int:
    """Bytes; ``getrusage`` would count what the parent held when it started this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def rough(pack: Pack, store: Store) -> int:
    """Bytes of memory that a pack takes, counted from its sizes; preprocessing is taken to drop no feature."""
    rows = {modality: store.rows(modality) for modality in _modalities(pack, store)}
    data = sum(count * len(store.features(modality)) for modality, count in rows.items())
    copies = 2 + len({data_key(trial.run, "") for trial in pack.trials})  # as read, on the device, prepared
    model = model_bytes(_shape(pack, store), replicates=len(pack.trials))
    return PROCESS + copies * data * BYTES_PER_NUMBER + COPIES_OF_MODEL * model


def _modalities(pack: Pack, store: Store) -> Sequence[str]:
    return pack.trials[0].run.data.modalities or store.modalities


def _shape(pack: Pack, store: Store) -> Shape:
    run = pack.trials[0].run
    features = {modality: len(store.features(modality)) for modality in _modalities(pack, store)}
    return build_shape(run, features, len(run.data.classes or store.classes))


def model_bytes(shape: Shape, *, replicates: int) -> int:
    """Bytes of the model of every replicate."""
    with torch.device("meta"):
        numbers = sum(prod(t.shape[1:]) for t in Modis(shape).state_dict().values())
    return int(numbers * BYTES_PER_NUMBER * replicates)


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
