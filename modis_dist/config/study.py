"""A study: a base run and how it is swept. Pure data; expansion into trials stands in ``sweep.manifest``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from modis_dist.config.run import Name, Run, Section, item


class Resources(Section):
    """What one pack of trials gets."""

    cpus: int | None = item(None, "CPU cores per pack; by default the cores are shared out", ge=1, le=4096)
    gpus: float | None = item(None, "GPUs per pack; 1 where a GPU is there, else 0", ge=0, le=64)


class Packing(Section):
    """Trials that differ only in seed, fold, rows or loss weights are trained as one stack."""

    enabled: bool = item(True, "stack trials")
    max_trials: int = item(8, "trials in a pack at most", unit="trials", ge=1, le=4096)


class Mlflow(Section):
    """Where results are mirrored to."""

    uri: str | None = item(None, "tracking URI; a SQLite file in the output folder by default")
    experiment: Name | None = item(None, "experiment; the study's name by default")


class Sweep(Section):
    """Which trainings a study is made of."""

    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = item(
        {}, "dotted key of the run -> values; every combination is tried and chosen among by `trainer.metric`"
    )
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


class Study(Run):
    """A run and its sweep."""

    sweep: Sweep = item(Sweep(), "which trainings the study is made of")

    def base(self) -> Run:
        """The run without its sweep."""
        return Run.model_validate(self.model_dump(exclude={"sweep"}))
