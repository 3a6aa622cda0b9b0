"""A trial: one training of a study. Its id is the hash of everything that decides its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from modis_dist.config.parse import Tree, build, digest, to_tree
from modis_dist.config.run import Run

ONLY_CONDITION = "all"
# Keys of ``trainer`` that do not affect results.
NOT_HASHED = ("device", "threads", "workers", "feature_storage", "log_every", "checkpoint_every")


@dataclass(frozen=True)
class Trial:
    """One training of a study."""

    id: str
    condition: str
    configuration: int  # position in the grid or the search
    params: dict[str, Any]  # settings of the grid or the search
    fold: int | None
    replicate: int
    run: Run

    @property
    def name(self) -> str:
        """Return a short readable name."""
        parts = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.params.items()]
        parts += [f"fold {self.fold}"] if self.fold is not None else []
        parts += [f"seed {self.run.seed}"]
        condition = "" if self.condition == ONLY_CONDITION else f"{self.condition}: "
        return condition + ", ".join(parts)

    def as_tree(self) -> Tree:
        """Return the trial as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"run": to_tree(self.run)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, source: str) -> "Trial":
        """Return the trial from the values of ``as_tree``."""
        return cls(**{**tree, "run": build(Run, tree["run"], source=source)})


def trial_id(run: Run, fingerprint: str) -> str:
    """Return the hash of everything that decides a training's result, short enough for a folder name."""
    tree = to_tree(run)
    tree.pop("name")
    for key in ("store", "simulate"):
        tree["data"].pop(key)
    tree["optim"].pop("preset")  # expanded into other keys
    for key in NOT_HASHED:
        tree["trainer"].pop(key)
    return digest([fingerprint, tree])[:16]


def sequence_digest(names: Sequence[str]) -> str:
    """Return the id of a pack: the hash of its trials' ids in order."""
    return digest(list(names))[:16]
