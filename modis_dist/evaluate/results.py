"""Files that a training writes beside its checkpoints: its result, interim result, history and settings.

Independent of torch. The final result is written last: a folder with a final result is complete.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.evaluate.baseline import Baseline
from modis_dist.metrics import Classification, Translation
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json, write_text
from modis_dist.runtime.text import shown
from modis_dist.train.progress import Status

VERSION = 2
RUN = "run.yaml"
RESULT = "result.json"
INTERIM_RESULT = "interim_result.json"
HISTORY = "history.json"

T = TypeVar("T")
HeldOut = Literal["validation", "test"]
EpochMetrics = dict[str, float | None]  # ``epoch``, ``seconds`` and terms named ``phase/name``; None if not finite


class Evaluation(TypedDict):
    """Metrics of a trained model on held-out rows."""

    classification: Classification
    translation: Translation
    probe: dict[str, float] | None  # of ``modality_probe``; None if not computed


class Result(TypedDict):
    """Result of a training, final or interim; without held-out rows ``evaluation`` and ``baseline`` are None."""

    version: int
    trial: str
    status: Status
    reason: str | None  # why it failed or was pruned
    epochs: int
    best_epoch: int | None
    changes: list[str]  # of machine and software at each resume
    metric: str
    value: float | None  # of ``metric`` at the best epoch
    evaluated_on: HeldOut
    training_rows: dict[str, int]
    evaluation: Evaluation | None
    baseline: Baseline | None


class StoreEvaluation(TypedDict):
    """Evaluation of a trained model on the rows of a store."""

    rows: Literal["test", "validation", "all"]
    left_out: int  # rows of classes that the model does not know
    training_rows_left_out: int | None  # None if training rows may be among the evaluated ones
    evaluation: Evaluation
    baseline: Baseline | None  # None on a store that the model was not trained on


def write_run(folder: Path, run: Run) -> None:
    """Write the settings of a training as a ``run.yaml`` that `modis-dist train` accepts."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(folder / RUN, parse.dump(run))


def read_run(folder: Path) -> Run | None:
    """Return the settings of a training, None before it starts. Raises ``ConfigError`` if they cannot be read."""
    return parse.load_run(folder / RUN) if (folder / RUN).exists() else None


def write_result(folder: Path, result: Result, *, name: str = RESULT) -> None:
    """Write a result; a training that has a final result is not repeated."""
    write_json(folder / name, result)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write one row per epoch. Written before any result."""
    rows = [{name: value if isfinite(value) else None for name, value in row.items()} for row in history]
    write_json(folder / HISTORY, rows)


def read_result(folder: Path) -> Result | None:
    """Return the final result of a training, None while it is unfinished. Raises ``DataError`` if damaged."""
    return read_json(folder / RESULT, Result, version=VERSION)


def read_interim_result(folder: Path) -> Result | None:
    """Return the result at the last rung, None before the first. Raises ``DataError`` if damaged."""
    return read_json(folder / INTERIM_RESULT, Result, version=VERSION)


def read_history(folder: Path) -> list[EpochMetrics]:
    """Return one row per epoch of a training that has a result. Raises ``DataError`` if missing or damaged."""
    rows = read_json(folder / HISTORY, list[EpochMetrics])
    if rows is None:
        raise DataError(f"{folder / HISTORY}: is missing; remove {folder / RESULT} and rerun the same command")
    return rows


def read_json(path: Path, kind: type[T], *, version: int | None = None) -> T | None:
    """Return the content of a JSON file as a ``kind``, None without the file.

    Raises ``DataError`` for another format version, and for a file that is damaged or incomplete.
    """
    try:
        content: Any = json.loads(path.read_bytes())
        written_by = content.get("version", 1) if isinstance(content, dict) else None
        if version is not None and written_by not in (version, None):
            raise DataError(f"{path}: has format version {written_by}, this program reads {version}; use another --out")
        value: T = _adapter(kind).validate_python(content, strict=True)  # type: ignore[arg-type]  # it is hashable
        return value
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        reason = type(error).__name__
    raise DataError(f"{path}: is damaged ({shown(reason)}); remove it and rerun the same command") from None


@cache  # building one takes 6 ms
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
