"""The summary of a study as ``summary.json`` stores it. ``study/`` writes it; tables and figures read it."""

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from modis_dist.evaluate.results import read_json
from modis_dist.runtime.files import write_json

VERSION = 2
SUMMARY, REPORT, OVERVIEW = "summary.json", "report.md", "sweep.png"
MODEL = "model"  # folder of the delivered model

Params = dict[str, Any]  # dotted key of the configuration -> value


class Spread(TypedDict):
    """Mean and sample standard deviation (None below two values) of ``n`` defined values."""

    mean: float | None
    sd: float | None
    n: int


Metrics = dict[str, Spread]


class Pruned(TypedDict):
    """Position of a configuration at the rung where it was pruned."""

    epoch: int
    rank: int
    of: int


class Group(Spread):
    """A configuration under a condition: its metric over folds and replicates; if pruned, at its last rung."""

    condition: str
    params: Params
    expected: int
    failed: int
    reasons: list[str]
    baseline: float | None  # mean
    probe: float | None  # mean of kNN
    epochs: int | None  # median best epoch
    pruned: Pruned | None
    trials: list[str]
    done_trials: list[str]
    failed_trials: list[str]


class RankedGroup(Group):
    """A group with its position among all groups, and true if it is the chosen one of its condition."""

    rank: int
    chosen: bool


class StudyModel(TypedDict):
    """A refitted model and its folder."""

    condition: str
    params: Params
    seed: int
    folder: str


class AbsentPairSpread(TypedDict):
    """Recall, over replicates, of a class in a modality that has no training rows of it."""

    label: str
    modality: str
    recall: Spread


class MeanTranslation(TypedDict):
    """Mean errors over replicates, keys ``[encoded][decoded]``; the baseline by modality."""

    mse: dict[str, dict[str, float | None]]
    all_pairs_baseline: dict[str, float | None]


class DetailedMetrics(TypedDict):
    """Test metrics by class, modality and pair of modalities."""

    per_class: dict[str, Metrics]  # recall and precision
    per_modality_recall: dict[str, dict[str, Spread]]
    absent_pairs: list[AbsentPairSpread]
    translation: MeanTranslation


class Condition(TypedDict):
    """Chosen configuration and test metrics of a condition over its refitted replicates; None if there are none."""

    condition: str
    best: RankedGroup | None
    test: Metrics | None
    baseline: Metrics | None  # on the same rows; a metric of other rows has n = 0
    probe: Metrics | None
    details: DetailedMetrics | None
    model: StudyModel | None


class Summary(TypedDict):
    """Summary of a finished study; ``best``, ``test`` and ``baseline`` are those of the first condition."""

    version: int
    study: str
    metric: str
    trials: dict[str, int]  # total, done, failed and pruned, of the search
    best: RankedGroup | None
    test: Metrics | None
    baseline: Metrics | None
    model: StudyModel | None  # delivered to the folder ``model``
    conditions: list[Condition]
    groups: list[RankedGroup]
    failures: dict[str, str]  # trial -> reason
    changes: dict[str, list[str]]  # trial -> changes of machine and software at resumes
    mlflow: dict[str, str | None]
    seconds: float


def write_summary(out: Path, summary: Summary) -> None:
    """Write the summary, the last file of a study."""
    write_json(out / SUMMARY, summary)


def read_summary(out: Path) -> Summary | None:
    """Return the summary of a study, None while it is unfinished. Raises ``DataError`` if damaged."""
    return read_json(out / SUMMARY, Summary, version=VERSION)
