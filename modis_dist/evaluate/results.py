"""What a finished training leaves behind beside its checkpoints: ``run.yaml``, ``result.json`` and figures' data."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.evaluate.evaluation import Probe, evaluate, plain_baseline
from modis_dist.evaluate.predictor import Predictor
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json, write_text
from modis_dist.train.prepare import Prepared
from modis_dist.train.progress import Progress
from modis_dist.train.seeds import mix
from modis_dist.train.stack import Member

RESULT = "result.json"
HISTORY = "history.json"
STANDING = "standing.json"
Judged = Literal["validation", "test"]


class Baselines:
    """Logistic regression per set of rows, computed once for all trainings that share them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[Prepared, dict[str, Any]]] = {}

    def of(self, prepared: Prepared, rows: Judged) -> dict[str, Any]:
        """The baseline of training rows on held-out rows."""
        key = (id(prepared), rows)
        if key not in self._known:
            subset = getattr(prepared, rows)
            self._known[key] = (prepared, plain_baseline(prepared, subset))
        return self._known[key][1]


def write_run(folder: Path, run: Run) -> None:
    """Keep the settings of a training as a ``run.yaml`` that runs again."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(folder / "run.yaml", parse.dump(run))


def conclude(
    member: Member,
    progress: Progress,
    *,
    judged_on: Judged,
    probe: bool,
    baselines: Baselines,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Judge a member's best model on its held-out rows; returns its result, where it failed with the reason.

    The history is written, the result is not: it says that all else is there (``write_result``). The networks run on
    ``device``.
    """
    result = _so_far(member, progress, judged_on)
    subset = getattr(member.prepared, judged_on)
    if progress.status == "done" and subset is not None:
        predictor = Predictor.open(member.folder, device=device)
        prepared = member.prepared
        probing = Probe(prepared.train, mix(member.run.seed, "probe")) if probe else None
        result["evaluation"] = evaluate(predictor, subset, absent_pairs=prepared.absent_pairs, probing=probing)
        result["baseline"] = baselines.of(member.prepared, judged_on)
    _write_history(member, progress)
    return result


def note_standing(member: Member, progress: Progress, *, judged_on: Judged) -> None:
    """Write how a member stands that is not trained to its end yet: ``standing.json``, like a result."""
    _write_history(member, progress)
    write_json(member.folder / STANDING, _so_far(member, progress, judged_on))


def _so_far(member: Member, progress: Progress, judged_on: Judged) -> dict[str, Any]:
    """What is known without judging the model."""
    return {
        "trial": member.trial,
        "status": progress.status,
        "reason": progress.reason,
        "epochs": progress.epochs,
        "best_epoch": progress.best_epoch,
        "changes": progress.changes,
        "metric": member.run.trainer.metric,
        "value": progress.best_value,
        "judged_on": judged_on,
        "training_rows": member.prepared.train.rows(),
        "evaluation": None,
        "baseline": None,
    }


def _write_history(member: Member, progress: Progress) -> None:
    """Before any result: where one is, so is what it came from."""
    write_json(member.folder / HISTORY, [_finite(row) for row in progress.history])


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Say that a training is done, figures and journal included: whoever finds the file does nothing any more."""
    write_json(folder / RESULT, dict(result))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in a training's folder, or None where it is not finished. Raises ``DataError`` if damaged."""
    return _read(folder / RESULT)


def read_standing(folder: Path) -> dict[str, Any] | None:
    """How a training stood when it was last compared with others, or None. Raises ``DataError`` if damaged."""
    return _read(folder / STANDING)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); remove it and rerun the command") from None
    return result


def read_history(folder: Path) -> list[dict[str, float | None]]:
    """One row per epoch, of a training that is finished or was compared with others."""
    rows: list[dict[str, float | None]] = json.loads((folder / HISTORY).read_text())
    return rows


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    """Strict JSON has no nan."""
    return {name: value if isfinite(value) else None for name, value in row.items()}
