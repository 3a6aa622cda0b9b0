"""A study: a base run and how it is swept. Pure data; expansion into trials stands in ``sweep.manifest``."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from modis_dist.config.run import Name, Run, Section, item, kind_only

# In an address: a password after a user's name, whatever stands before a server's (a token may), one among the options.
SECRET = re.compile(r"//[^/@]*:.*@|^https?://[^/]*@|[?&;].*(password|passwd|pwd)(=|%3d)", re.IGNORECASE)


class Resources(Section):
    """What one pack of trials gets."""

    cpus: int | None = item(None, "CPU cores per pack; by default the cores are shared out", ge=1, le=4096)
    gpus: float | None = item(
        None, "GPUs per pack, a whole number or a share of one; 1 where a GPU is there, else 0", ge=0, le=64
    )

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"must be a whole number, or a share below 1 of one GPU (got {value:g})")
        return value


class Packing(Section):
    """Trials that differ only in seed, fold, rows or loss weights are trained as one stack."""

    enabled: bool = item(True, "stack trials")
    max_trials: int | None = item(
        None,
        "trials in a pack at most; by default 8 (on a GPU 32), or as many as have networks of 1.5 GB together, which "
        "fits a GPU of 16 GB. `tune --dry-run` measures what other sizes would gain",
        unit="trials",
        ge=1,
        le=4096,
    )


class Mlflow(Section):
    """MLflow tracking of a study."""

    enabled: bool = item(True, "send the study to MLflow")
    uri: str | None = item(None, "tracking URI, without a password; a SQLite file in the output folder by default")
    experiment: Name | None = item(None, "experiment; the study's name by default")

    @field_validator("uri")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value is not None and SECRET.search(value):
            raise ValueError(
                "holds a password or token, and studies are written to files; give it in the environment "
                "(MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; of a database: "
                "PGPASSWORD, or a file that its driver reads)"
            )
        return value


class Dimension(Section):
    """Where the values of one key are looked for: a range, or a list."""

    low: float | None = item(None, "smallest value of a range; values are drawn to three significant digits")
    high: float | None = item(None, "largest value of a range")
    log: bool = item(False, "drawn evenly on a logarithmic scale, where every power of ten is as likely")
    step: float | None = item(None, "only low, low + step, low + 2 step, ...", gt=0)
    choices: tuple[Any, ...] | None = item(None, "a list of values instead of a range, each as likely", min_length=1)

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Dimension":
        ends, ranged = (self.low, self.high), self.log or self.step is not None
        if self.choices is not None and (ends != (None, None) or ranged):
            raise ValueError("give choices alone, or a range")
        if self.choices is None and (self.low is None or self.high is None):
            raise ValueError("give low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high ({self.high:g}); got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("give log or step, not both")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"with log, low must be > 0; got {self.low:g}")
        return self


class RandomSearch(Section):
    kind: Literal["random"] = item("random", "configurations drawn from sweep.space independently of each other")
    configurations: int = item(
        20, "how many are drawn; raised later, the first ones stay as they are", unit="configurations", ge=1, le=100_000
    )
    seed: int = item(0, "seed of the draws", ge=0, lt=2**63)


class OptunaSearch(Section):
    kind: Literal["optuna"] = item("optuna", "rounds of configurations, proposed by Optuna's TPE from what came before")
    configurations: int = item(
        30, "how many are tried; raised later, the first ones stay as they are", unit="configurations", ge=1, le=100_000
    )
    at_once: int = item(
        6,
        "configurations of a round; all are trained and judged by their whole groups before the next are proposed, "
        "for every condition by itself. The first round is drawn at random",
        unit="configurations",
        ge=1,
        le=10_000,
    )
    seed: int = item(0, "seed of the draws and of the proposals", ge=0, lt=2**63)


_Search = Annotated[RandomSearch | OptunaSearch, Field(discriminator="kind")]
AnySearch = Annotated[_Search, BeforeValidator(kind_only, json_schema_input_type=_Search | Literal["random", "optuna"])]


class Pruning(Section):
    """Successive halving of whole configurations (Jamieson and Talwalkar 2016) at the rungs of ASHA (Li et al. 2020).

    Rungs are synchronous: all configurations of a round stop there and are compared. Decisions made as results come
    in would depend on the number of cores and on every interruption; these do not.
    """

    min_epochs: int = item(
        20,
        "epochs to the first rung; the next are at min_epochs * factor, * factor^2, ... At a rung, configurations are "
        "compared by their best `trainer.metric` up to there, mean over all folds and replicates of a condition",
        unit="epochs",
        ge=1,
    )
    factor: int = item(
        3,
        "at a rung the best 1 / factor (at least one) go on, the others are pruned with all their folds and "
        "replicates. All wait for the slowest there, so that the outcome depends on no core and no interruption",
        ge=2,
        le=100,
    )

    def rungs(self, *, epochs: int) -> list[int]:
        """The epochs at which a training of so many epochs is compared with others."""
        found, rung = [], self.min_epochs
        while rung < epochs:
            found.append(rung)
            rung *= self.factor
        return found


class Sweep(Section):
    """Which trainings a study is made of."""

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = item(
        {}, "dotted key of the run -> values; every combination is tried and chosen among by `trainer.metric`"
    )
    search: AnySearch | None = item(
        None, "search of sweep.space in place of a grid: random or optuna; equal configurations are trained once"
    )
    space: dict[str, Dimension] = item({}, "dotted key of the run -> the range, or the choices, that are searched")
    pruning: Pruning | None = item(None, "stop configurations early that fall behind; none by default")
    conditions: dict[Name, dict[str, Any]] = item(
        {}, "named settings that are compared, not chosen among: each gets its own choice and its own test score"
    )
    folds: int = item(
        1, "cross-validation folds; 1 takes one validation split of data.split.validation_fraction", ge=1, le=100
    )
    replicates: int = item(1, "seeds per configuration: seed, seed + 1, ...", ge=1, le=10_000)
    packing: Packing = item(Packing(), "stacking of trials")
    resources: Resources = item(Resources(), "cores and GPUs per pack")
    executor: Literal["ray", "local"] = item("ray", "Ray Tune, or one pack after the other in this process")
    probe: bool = item(True, "alignment probe on every trial's validation rows")
    mlflow: Mlflow = item(Mlflow(), "tracking")

    @model_validator(mode="after")
    def _grid_or_search(self) -> "Sweep":
        if self.search is not None and self.grid:
            raise ValueError("give grid or search, not both; a list of values is searched as {choices: [...]} in space")
        if (self.search is None) != (not self.space):
            raise ValueError("search and space belong together: how to search, and what")
        return self


class Study(Run):
    """A run and its sweep."""

    sweep: Sweep = item(Sweep(), "which trainings the study is made of")

    def base(self) -> Run:
        """The run without its sweep."""
        return Run.model_validate(self.model_dump(exclude={"sweep"}))
