"""Every key of a study: a base run and its sweep. ``study.manifest`` expands it into trials."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from modis_dist.config.run import Name, Run, Section, item, kind_only

# A password after a user name, any credential before the host of an HTTP URI, or a password option.
SECRET = re.compile(r"//[^/@]*:.*@|^https?://[^/]*@|[?&;].*(password|passwd|pwd)(=|%3d)", re.IGNORECASE)


class Resources(Section):
    """Resources of one pack of trials."""

    cpus: int | None = item(
        None, "CPU cores per pack; default: all cores, divided among concurrent packs", ge=1, le=4096
    )
    gpus: float | None = item(
        None,
        "GPUs per pack: an integer, or a fraction of one GPU; default: 1 if there is a GPU, else 0",
        ge=0,
        le=64,
    )

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError(f"must be an integer, or a fraction below 1 of one GPU (got {value:g})")
        return value


class Packing(Section):
    """Stacking of trials: those that differ only in seed, fold, rows or loss weights train as one stack."""

    enabled: bool = item(True, "train similar trials as one stack (a pack)")
    max_trials: int | None = item(
        None,
        "maximum number of trials per pack; default: 8 (on a GPU 32), or fewer, so that the networks of a pack take at "
        "most 1.5 GB (fits a GPU of 16 GB)",
        unit="trials",
        ge=1,
        le=4096,
    )


class Mlflow(Section):
    """MLflow tracking."""

    enabled: bool = item(True, "log the study to MLflow")
    tracking_uri: str | None = item(
        None, "MLflow tracking URI, without a password; default: a SQLite file in the output folder"
    )
    experiment_name: Name | None = item(None, "MLflow experiment; default: the name of the study")

    @field_validator("tracking_uri")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value is not None and SECRET.search(value):
            raise ValueError(
                "contains a password or token, which would be written to files; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment (for a database: PGPASSWORD or "
                "the password file of its driver)"
            )
        return value


class Dimension(Section):
    """The search space of one key: a range, or a list of choices."""

    low: float | None = item(None, "lower bound; sampled values are rounded to three significant digits")
    high: float | None = item(None, "upper bound")
    log: bool = item(False, "sample uniformly on a logarithmic scale")
    step: float | None = item(None, "restrict values to low, low + step, low + 2 step, ...", gt=0)
    choices: tuple[Any, ...] | None = item(
        None, "values to choose from, with equal probability, instead of a range", min_length=1
    )

    @model_validator(mode="after")
    def _range_or_choices(self) -> "Dimension":
        ends, ranged = (self.low, self.high), self.log or self.step is not None
        if self.choices is not None and (ends != (None, None) or ranged):
            raise ValueError("choices cannot be combined with low, high, log or step")
        if self.choices is None and (self.low is None or self.high is None):
            raise ValueError("set low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low must be below high ({self.high:g}); got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("set log or step, not both")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"with log, low must be > 0; got {self.low:g}")
        return self


class RandomSearch(Section):
    kind: Literal["random"] = item("random", "independent random draws from sweep.space")
    configurations: int = item(
        20,
        "number of configurations; may be raised later, earlier configurations stay the same",
        unit="configurations",
        ge=1,
        le=100_000,
    )
    seed: int = item(0, "seed of the random configurations", ge=0, lt=2**63)


class OptunaSearch(Section):
    kind: Literal["optuna"] = item(
        "optuna", "rounds of configurations proposed by Optuna's TPE sampler from earlier results"
    )
    configurations: int = item(
        30,
        "number of configurations; may be raised later, earlier configurations stay the same",
        unit="configurations",
        ge=1,
        le=100_000,
    )
    round_size: int = item(
        6,
        "configurations per round; a round finishes, with all folds and replicates, before the next is proposed. Each "
        "condition is searched separately; the first round is random",
        unit="configurations",
        ge=1,
        le=10_000,
    )
    seed: int = item(0, "seed of the sampler", ge=0, lt=2**63)


_Search = Annotated[RandomSearch | OptunaSearch, Field(discriminator="kind")]
AnySearch = Annotated[_Search, BeforeValidator(kind_only, json_schema_input_type=_Search | Literal["random", "optuna"])]


class Pruning(Section):
    """Synchronous successive halving of configurations (Jamieson and Talwalkar 2016; Li et al. 2020).

    All configurations of a round stop at a rung and are compared. Asynchronous decisions would depend on the number of
    cores and on interruptions; these do not.
    """

    min_epochs: int = item(
        20,
        "epochs before the first rung; later rungs are at min_epochs * factor, * factor^2, ... Configurations are "
        "compared by their best `trainer.metric` so far, averaged over folds and replicates, within each condition",
        unit="epochs",
        ge=1,
    )
    factor: int = item(
        3,
        "reduction factor: at each rung the best 1 / factor of the configurations (at least one) continue; the others "
        "are pruned with all their folds and replicates. Rungs are synchronous",
        ge=2,
        le=100,
    )

    def rungs(self, *, epochs: int) -> list[int]:
        """Return the epochs of the rungs of a training with ``epochs`` epochs."""
        rungs, rung = [], self.min_epochs
        while rung < epochs:
            rungs.append(rung)
            rung *= self.factor
        return rungs


class Sweep(Section):
    """The trials of a study."""

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = item(
        {}, "grid search: dotted key of the run -> list of values; `trainer.metric` selects the best combination"
    )
    search: AnySearch | None = item(
        None, "search over sweep.space instead of a grid: random or optuna; duplicate configurations are trained once"
    )
    space: dict[str, Dimension] = item({}, "search space: dotted key of the run -> range or choices")
    pruning: Pruning | None = item(None, "early stopping of inferior configurations; default: off")
    conditions: dict[Name, dict[str, Any]] = item(
        {},
        "settings to compare: name -> {dotted key: value}; each selects and tests its own best configuration",
    )
    folds: int = item(
        1, "number of cross-validation folds; 1: a single split with data.split.validation_fraction", ge=1, le=100
    )
    replicates: int = item(1, "number of seeds per configuration: seed, seed + 1, ...", ge=1, le=10_000)
    packing: Packing = item(Packing(), "stacking of trials")
    resources: Resources = item(Resources(), "CPU cores and GPUs per pack")
    executor: Literal["ray", "local"] = item(
        "ray", "ray: packs run in parallel under Ray Tune; local: one at a time, in this process"
    )
    probe: bool = item(
        True, "evaluate how well a classifier predicts the modality of validation rows from their latents (alignment)"
    )
    mlflow: Mlflow = item(Mlflow(), "MLflow tracking")

    @model_validator(mode="after")
    def _grid_or_search(self) -> "Sweep":
        if self.search is not None and self.grid:
            raise ValueError("set grid or search, not both; in space, write a list of values as {choices: [...]}")
        if (self.search is None) != (not self.space):
            raise ValueError("search and space must be set together")
        return self


class Study(Run):
    """The configuration of a study."""

    sweep: Sweep = item(Sweep(), "trials of the study, resources and tracking")

    def base(self) -> Run:
        """Return the run without the sweep."""
        return Run.model_validate(self.model_dump(exclude={"sweep"}))
