"""Memory of a pack and the number of packs that fit at once; measured only if a rough estimate is near the limit.

A pack is measured in a separate process, which reads its data, trains a few steps and saves. The result is compared
with the total memory of this machine or job, not with the memory that is free at the moment, so that the same study
always runs with the same concurrency.
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

from modis_dist.data.store.arrays import BYTES_PER_VALUE
from modis_dist.data.store.reader import Store
from modis_dist.execution.resources import Cluster
from modis_dist.execution.run_pack import Pack, chosen_device, kinds_of_data, run_pack, study_layout
from modis_dist.model.networks import Modis, Shape
from modis_dist.runtime.errors import Interrupted, ModisError
from modis_dist.runtime.files import clear_leftovers
from modis_dist.runtime.processes import end_with_parent
from modis_dist.train.cuda_graph import WARM_UP
from modis_dist.train.placement import memory_limit, storage_of
from modis_dist.train.prepare import SelectionOf, build_shape, data_key, prepared_bytes, row_counts

STEPS = WARM_UP + 2  # steps of a measurement; a captured step takes additional memory
MARGIN = 1.25  # factor on the measured bytes, for validation and evaluation
MEMORY_FRACTION = 0.8  # of the total; the rest is for the driver, Ray and the system
CERTAIN = 3  # a rough estimate that fits this many times is not measured
PROCESS = 700 * 2**20  # bytes of Python with torch
CONTEXT = 600 * 2**20  # bytes of CUDA in every process
COPIES_OF_LAST = 4  # in a checkpoint: parameters, two moments, best model
COPIES_OF_MODEL = 8  # in memory: the same four, twice, because a stack is copied when a member leaves it


@dataclass(frozen=True)
class Footprint:
    """Bytes that the process of a pack takes on the host and on its GPU, and the total memory of that GPU."""

    host: int
    gpu: int = 0
    gpu_total: int = 0


@dataclass(frozen=True)
class ConcurrencyLimit:
    """Maximum number of packs trained at once, in total and per GPU."""

    packs: int
    per_gpu: int = 1


def packs_that_fit(
    packs: Sequence[Pack],
    limit: ConcurrencyLimit,
    *,
    machine: Cluster,
    workers: int,
    threads: int,
    out: Path,
    store: Path,
    known: dict[int, Footprint | None],
) -> ConcurrencyLimit:
    """Return ``limit``, or a lower limit, with a warning, if fewer packs of ``workers`` workers fit into memory.

    Every node is assumed to have the memory of this one. ``known`` maps the rough estimate of measured packs to their
    footprints; a new measurement is added.
    """
    limit = ConcurrencyLimit(limit.packs, min(limit.per_gpu, limit.packs))
    opened, nodes, node_bytes = Store.open(store), len(machine.nodes), MEMORY_FRACTION * memory_limit()
    largest = max(packs, key=lambda pack: estimate_host_bytes(pack, opened))
    estimate = estimate_host_bytes(largest, opened)
    certain = CERTAIN * limit.packs * workers * estimate <= nodes * node_bytes
    if limit == ConcurrencyLimit(1, 1) or (certain and limit.per_gpu == 1):
        return limit
    larger = [size for size in known if size >= estimate]
    if not larger:
        known[estimate] = measure(largest, threads=threads, out=out, store=store)
    footprint = known[min(larger, default=estimate)]
    if footprint is None:
        logging.getLogger(__name__).warning("memory of a pack could not be measured; one pack is trained at a time")
        return ConcurrencyLimit(1, 1)
    fitting = _fitting(footprint, limit, machine=machine, workers=workers, node_bytes=node_bytes)
    if fitting != limit and not larger:
        message = _limit_message(footprint, fitting, limit, workers=workers, node_bytes=node_bytes)
        logging.getLogger(__name__).warning("%s", message)
    return fitting


def _fitting(
    footprint: Footprint, limit: ConcurrencyLimit, *, machine: Cluster, workers: int, node_bytes: float
) -> ConcurrencyLimit:
    """Return ``limit``, or the lower limit at which packs of this footprint fit; at least one pack."""
    per_gpu = limit.per_gpu
    if footprint.gpu:
        per_gpu = max(1, min(per_gpu, int(MEMORY_FRACTION * footprint.gpu_total / footprint.gpu)))
    on_gpus = machine.gpus * per_gpu if per_gpu < limit.per_gpu else limit.packs
    in_memory = len(machine.nodes) * int(node_bytes / footprint.host) // workers
    return ConcurrencyLimit(max(1, min(limit.packs, in_memory, on_gpus)), per_gpu)


def _limit_message(
    footprint: Footprint, fitting: ConcurrencyLimit, limit: ConcurrencyLimit, *, workers: int, node_bytes: float
) -> str:
    if fitting.per_gpu < limit.per_gpu:
        return (
            f"a pack uses {footprint.gpu / 1e9:.1f} GB of GPU memory (measured), the limit per GPU is "
            f"{MEMORY_FRACTION * footprint.gpu_total / 1e9:.1f} GB: {fitting.per_gpu} pack(s) per GPU, "
            f"{fitting.packs} at a time"
        )
    each = f" of {workers} workers" if workers > 1 else ""
    return (
        f"a worker uses {footprint.host / 1e9:.1f} GB of memory (measured), the limit per node is "
        f"{node_bytes / 1e9:.1f} GB: {fitting.packs} pack(s){each} at a time instead of {limit.packs}"
    )


def measure(pack: Pack, *, threads: int, out: Path, store: Path) -> Footprint | None:
    """Return the footprint of a pack, measured below ``out``; None if its training fails."""
    clear_leftovers(out)
    spawn = get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with TemporaryDirectory(dir=out, prefix=".measurement-", suffix=".tmp") as folder:
        process = spawn.Process(target=_measure, args=(pack, threads, Path(folder), store, sender), daemon=True)
        process.start()
        sender.close()
        try:
            peak: Footprint = receiver.recv()
        except EOFError:  # the process died or failed
            return None
        finally:
            process.join()
    # From the first validation on, the process has a copy of the best model.
    best = model_bytes(_shape(pack, Store.open(store)), slots=len(pack.trials))
    if peak.gpu:
        return Footprint(int(MARGIN * peak.host), int(MARGIN * (peak.gpu + best)) + CONTEXT, peak.gpu_total)
    return Footprint(int(MARGIN * (peak.host + best)))


def _measure(pack: Pack, threads: int, out: Path, store: Path, sender: Connection) -> None:
    """Send the peak memory of reading, preparing, a few steps and a checkpoint; runs in a separate process."""
    end_with_parent()
    try:
        run_pack(pack, study_layout(out, pack), store=store, stop=AfterSteps(STEPS), threads=threads)
    except Interrupted:
        pass  # requested by AfterSteps
    except ModisError:
        sys.exit(1)  # training the pack will report the error
    device = chosen_device(pack.trials[0].run)
    host = _peak_of_this_process()
    if device.type == "cuda":
        sender.send(Footprint(host, torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]))
    else:
        sender.send(Footprint(host))


class AfterSteps:
    """Requests the end of a training after a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps_left = steps

    def requested(self) -> str | None:
        """Return the reason to stop, or None."""
        self._steps_left -= 1
        return None if self._steps_left > 0 else "the measurement is done"


def _peak_of_this_process() -> int:
    """Return the peak memory in bytes; ``getrusage`` would include that of the parent when it started this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def estimate_host_bytes(pack: Pack, store: Store) -> int:
    """Return the bytes of memory of a pack without a GPU, estimated as if preprocessing dropped no feature."""
    return estimate_footprint(pack, store, _shape(pack, store), gpu=False).host


def estimate_footprint(pack: Pack, store: Store, shape: Shape, *, gpu: bool, limit: int | None = None) -> Footprint:
    """Return the footprint of a pack, estimated from its sizes.

    With a GPU, host memory holds the data as read and a checkpoint being written. ``limit`` is the memory in bytes of
    the machine that trains the pack; None for this machine.
    """
    model, in_memory = model_bytes(shape, slots=len(pack.trials)), _in_memory(pack, store, limit)
    read = BYTES_PER_VALUE * sum(width * store.rows(m) for m, width in _features(pack, store).items())
    on_device = BYTES_PER_VALUE * sum(width * store.rows(m) for m, width in shape.features.items())
    prepared = on_device * kinds_of_data(pack)
    if gpu:
        data = read + prepared if in_memory else 0
        return Footprint(PROCESS + data + COPIES_OF_LAST * model, CONTEXT + on_device + COPIES_OF_MODEL * model)
    data = read + prepared + on_device if in_memory else 0
    return Footprint(PROCESS + data + COPIES_OF_MODEL * model)


def on_disk(pack: Pack, store: Store, selection_of: SelectionOf, *, limit: int | None = None) -> int:
    """Return the bytes of features that a pack keeps in the temporary folder; 0 if it keeps them in memory.

    The result is the sum over all its workers, on one machine.
    """
    if _in_memory(pack, store, limit):
        return 0
    features, test = _features(pack, store), pack.evaluated_on == "test"
    sizes_of_data = [
        prepared_bytes(run, row_counts(run, selection_of(run)), features, test=test).values()
        for run in {data_key(trial.run, ""): trial.run for trial in pack.trials}.values()
    ]
    for_baseline = max(max(sizes) for sizes in sizes_of_data)
    return pack.trials[0].run.trainer.workers * (sum(sum(sizes) for sizes in sizes_of_data) + for_baseline)


def _in_memory(pack: Pack, store: Store, limit: int | None) -> bool:
    return storage_of(pack.trials[0].run, store, kinds=kinds_of_data(pack), limit=limit) == "memory"


def _features(pack: Pack, store: Store) -> dict[str, int]:
    """Return the number of features of each modality in the store."""
    modalities = pack.trials[0].run.data.modalities or store.modalities
    return {modality: len(store.features(modality)) for modality in modalities}


def _shape(pack: Pack, store: Store) -> Shape:
    run = pack.trials[0].run
    return build_shape(run, _features(pack, store), len(run.data.classes or store.classes))


def model_bytes(shape: Shape, *, slots: int) -> int:
    """Return the bytes of the parameters of a stack."""
    with torch.device("meta"):
        numbers = sum(prod(t.shape[1:]) for t in Modis(shape).state_dict().values())
    return int(numbers * BYTES_PER_VALUE * slots)
