"""How much memory a pack takes and how many packs fit at once: measured, where a rough count says that it may matter.

A pack is tried in a process of its own, which reads its data, trains a few steps and saves. It is compared with all the
memory this machine or job has, not with what is free at the moment: the same study is to be shared out in the same way
whenever it is started.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from modis_dist.data.store.reader import Store
from modis_dist.execution.resources import Cluster
from modis_dist.execution.run_pack import Pack, chosen_device, kinds_of_data, run_pack
from modis_dist.model.networks import Modis, Shape
from modis_dist.runtime.errors import Interrupted, ModisError
from modis_dist.runtime.files import clear_leftovers
from modis_dist.runtime.processes import end_with_parent
from modis_dist.train import cpu_settings
from modis_dist.train.callbacks import NullReporter
from modis_dist.train.cuda_graph import WARM_UP
from modis_dist.train.placement import memory_limit, storage_of
from modis_dist.train.prepare import SelectionOf, build_shape, data_key, prepared_bytes, row_counts

STEPS = WARM_UP + 2  # that are tried; a recorded one takes memory of its own
MARGIN = 1.25  # of what was measured, for validation and judging
SHARE = 0.8  # of the memory there is; the rest is the driver's, Ray's and the system's
DOUBT = 3  # a rough count that fits so many times is not measured
PROCESS = 700 * 2**20  # bytes of Python with torch
CONTEXT = 600 * 2**20  # bytes that CUDA takes in every process
COPIES_OF_LAST = 4  # of parameters in a checkpoint: they, two moments, best
COPIES_OF_MODEL = 8  # parameters, two moments, the best so far, and the same of a stack that a replicate has left
BYTES_PER_NUMBER = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that the process of a pack takes, of the machine and of its GPU, and all that this GPU has."""

    host: int
    gpu: int = 0
    gpu_total: int = 0


@dataclass(frozen=True)
class ConcurrencyLimit:
    """How many packs are trained at once, at most, and how many on one GPU."""

    packs: int
    per_gpu: int = 1


def packs_that_fit(
    packs: Sequence[Pack],
    wanted: ConcurrencyLimit,
    *,
    machine: Cluster,
    workers: int,
    threads: int,
    out: Path,
    store: Path,
    known: dict[int, Footprint | None],
) -> ConcurrencyLimit:
    """As many of the packs at once as wanted, or as few as fit where every one has so many workers.

    Of several nodes all are taken to have the memory of this one. Where less than wanted fit, a warning says so.
    ``known`` is what was measured before, by the rough count of the pack; what is measured now is added.
    """
    wanted = ConcurrencyLimit(wanted.packs, min(wanted.per_gpu, wanted.packs))
    held, nodes, limit = Store.open(store), len(machine.nodes), SHARE * memory_limit()
    largest = max(packs, key=lambda pack: rough(pack, held))
    count = rough(largest, held)
    certain = DOUBT * wanted.packs * workers * count <= nodes * limit
    if wanted == ConcurrencyLimit(1, 1) or (certain and wanted.per_gpu == 1):
        return wanted
    larger = [size for size in known if size >= count]
    size = min(larger, default=count)
    if not larger:
        known[size] = measured(largest, threads=threads, out=out, store=store)
    found = known[size]
    if found is None:
        logging.getLogger(__name__).warning("a pack could not be tried for its memory; one is trained at a time")
        return ConcurrencyLimit(1, 1)
    per_gpu = max(1, min(wanted.per_gpu, int(SHARE * found.gpu_total / found.gpu))) if found.gpu else wanted.per_gpu
    on_gpus = machine.gpus * per_gpu if per_gpu < wanted.per_gpu else wanted.packs
    in_memory = nodes * int(limit / found.host) // workers
    fit = ConcurrencyLimit(max(1, min(wanted.packs, in_memory, on_gpus)), per_gpu)
    if fit != wanted and not larger:
        logging.getLogger(__name__).warning("%s", _told(found, fit, wanted, workers=workers, limit=limit))
    return fit


def _told(found: Footprint, fit: ConcurrencyLimit, wanted: ConcurrencyLimit, *, workers: int, limit: float) -> str:
    if fit.per_gpu < wanted.per_gpu:
        takes = f"a pack takes {found.gpu / 1e9:.1f} GB of its GPU (measured), packs may have"
        return f"{takes} {SHARE * found.gpu_total / 1e9:.1f} GB of each: {fit.per_gpu} share one, {fit.packs} at a time"
    takes = f"a worker takes {found.host / 1e9:.1f} GB of memory (measured), a node may give {limit / 1e9:.1f} GB"
    each = f" of {workers} workers" if workers > 1 else ""
    return f"{takes}: {fit.packs} pack(s){each} at a time instead of {wanted.packs}"


def measured(pack: Pack, *, threads: int, out: Path, store: Path) -> Footprint | None:
    """What a pack takes, by trying it below ``out``; None where the trial fails, as the pack itself then will."""
    clear_leftovers(out)
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    with TemporaryDirectory(dir=out, prefix=".probe-", suffix=".tmp") as folder:
        trial = spawn.Process(target=_tried, args=(pack, threads, Path(folder), store, theirs), daemon=True)
        trial.start()
        theirs.close()
        try:
            taken: Footprint = ours.recv()
        except EOFError:  # it has died, or said why it fails
            return None
        finally:
            trial.join()
    # The best model so far is kept from the first validation on.
    best = model_bytes(_shape(pack, Store.open(store)), replicates=len(pack.trials))
    if taken.gpu:
        return Footprint(int(MARGIN * taken.host), int(MARGIN * (taken.gpu + best)) + CONTEXT, taken.gpu_total)
    return Footprint(int(MARGIN * (taken.host + best)))


def _tried(pack: Pack, threads: int, out: Path, store: Path, answer: Connection) -> None:
    """In the process: the peak of reading, preparing, a few steps and a checkpoint."""
    end_with_parent()
    cpu_settings.use(threads)
    try:
        run_pack(pack, out=out, store=store, reporter=NullReporter(), stop=AfterSteps(STEPS))
    except Interrupted:
        pass  # as wanted
    except ModisError:
        sys.exit(1)  # the pack itself will say why
    device = chosen_device(pack.trials[0].run)
    host = _peak_of_this_process()
    if device.type == "cuda":
        answer.send(Footprint(host, torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]))
    else:
        answer.send(Footprint(host))


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
    return on_processor(pack, store, _shape(pack, store)).host


def on_processor(pack: Pack, store: Store, shape: Shape, *, limit: int | None = None) -> Footprint:
    """What a pack of networks of a shape takes where it is trained without a GPU, counted from its sizes.

    ``limit``: bytes of memory that it has there; None on this machine.
    """
    model = model_bytes(shape, replicates=len(pack.trials))
    data = sum(_data(pack, store, shape)) if _in_memory(pack, store, limit) else 0
    return Footprint(PROCESS + data + COPIES_OF_MODEL * model)


def on_gpu(pack: Pack, store: Store, shape: Shape, *, limit: int | None = None) -> Footprint:
    """The same where it is trained on a GPU; of the memory it needs what is read, and a checkpoint being written."""
    model, (read, ready, on_device) = model_bytes(shape, replicates=len(pack.trials)), _data(pack, store, shape)
    data = read + ready if _in_memory(pack, store, limit) else 0
    return Footprint(PROCESS + data + COPIES_OF_LAST * model, CONTEXT + on_device + COPIES_OF_MODEL * model)


def on_disk(pack: Pack, store: Store, selection_of: SelectionOf, *, limit: int | None = None) -> int:
    """Bytes of features that a pack keeps in the temporary folder; 0 where it has them in memory.

    It is what its workers ask for, all of them on one machine, before they begin.
    """
    if _in_memory(pack, store, limit):
        return 0
    features = {modality: len(store.features(modality)) for modality in _modalities(pack, store)}
    kept = [
        prepared_bytes(run, row_counts(run, selection_of(run)), features, test=pack.judged_on == "test").values()
        for run in {data_key(trial.run, ""): trial.run for trial in pack.trials}.values()
    ]
    for_baseline = max(max(sizes) for sizes in kept)
    return pack.trials[0].run.trainer.workers * (sum(sum(sizes) for sizes in kept) + for_baseline)


def _in_memory(pack: Pack, store: Store, limit: int | None) -> bool:
    """Whether its features are kept there, not on a disk."""
    return storage_of(pack.trials[0].run, store, kinds=kinds_of_data(pack), limit=limit) == "memory"


def _data(pack: Pack, store: Store, shape: Shape) -> tuple[int, int, int]:
    """Bytes of the data as read, prepared for every fold and scenario, and on the device."""
    rows = {modality: store.rows(modality) for modality in _modalities(pack, store)}
    read = BYTES_PER_NUMBER * sum(count * len(store.features(modality)) for modality, count in rows.items())
    ready = BYTES_PER_NUMBER * sum(count * shape.features[modality] for modality, count in rows.items())
    return read, ready * kinds_of_data(pack), ready


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
