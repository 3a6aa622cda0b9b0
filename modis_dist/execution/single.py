"""A single run without a study: a pack of one trial in its own folder."""

from pathlib import Path

from modis_dist.config.run import Run
from modis_dist.data.open_store import open_store
from modis_dist.evaluate.results import RESULT, Result, read_result
from modis_dist.execution.run_pack import LAST, Layout, Pack, chosen_device, run_pack
from modis_dist.execution.trial import ONLY_CONDITION, Trial, trial_id
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.runtime.lock import PATIENCE_S
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Reporter, Stop
from modis_dist.train.process_group import ALONE, RankSpec


def train_run(
    run: Run,
    *,
    out: Path,
    source: str,
    reporter: Reporter,
    stop: Stop,
    threads: int | None = None,
    spec: RankSpec = ALONE,
) -> Result | None:
    """Train a run into ``out``, or resume it there; return its result.

    Collective: every rank calls it; only rank 0 writes, the others return None. Raises ``RunFailed`` if the training
    diverges or disk or memory is full, ``Interrupted`` after a stop request, ``DataError`` if ``out`` belongs to
    another run.
    """
    chosen_device(run)  # raises before a store is simulated
    store = open_store(run.data, out=out, source=source)
    trial = Trial(trial_id(run, store.fingerprint), ONLY_CONDITION, 0, {}, None, 0, run)
    earlier = read_result(out)
    if earlier is not None and earlier["trial"] != trial.id:
        raise DataError(f"{out}: contains another run (settings or data differ); use another --out")
    if earlier is not None and earlier["status"] == "done":
        return earlier
    if any((out / name).exists() for name in ("manifest.json", "study.yaml")):
        raise DataError(f"{out}: contains a store or a study; use another --out")
    (out / RESULT).unlink(missing_ok=True)  # of a training that failed: it runs again
    layout = single_layout(out, trial, lock_patience_s=PATIENCE_S if spec.size > 1 else 0)
    run_pack(Pack((trial,)), layout, store=store.path, stop=stop, reporter=reporter, threads=threads, spec=spec)
    if spec.rank > 0:
        return None
    result = read_result(out)
    assert result is not None, "a training that ended has its result"
    if result["status"] == "failed":
        raise RunFailed(f"{out}: {result['reason']}; {_failure_advice(out)}")
    return result


def single_layout(out: Path, trial: Trial, *, lock_patience_s: float = PATIENCE_S) -> Layout:
    """Return the layout of a single run.

    ``lock_patience_s``: restarted ranks wait until a killed rank has released the lock; a single process need not wait.
    """
    return Layout(out, {trial.id: out}, figures=True, keep_last=True, lock_patience_s=lock_patience_s)


def _failure_advice(out: Path) -> str:
    newest = checkpoint.newest(out / LAST)
    where = f"the last valid checkpoint is {newest}" if newest else "no checkpoint was written yet"
    return f"{where}; lower optim.lr or check the values of that modality, and use another --out"
