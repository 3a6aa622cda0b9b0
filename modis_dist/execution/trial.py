"""One training of a study: its run, and an id that is the hash of everything that decides its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from modis_dist.config.parse import Tree, build, digest, to_tree
from modis_dist.config.run import Run

ONLY_CONDITION = "all"
NOT_LEARNT = (
    "device",
    "threads",
    "workers",
    "feature_storage",
    "log_every",
    "checkpoint_every",
)  # of trainer: they change no result


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    id: str
    condition: str
    configuration: int  # position in the grid or the search
    params: dict[str, Any]  # what the grid or the search set
    fold: int | None
    replicate: int
    run: Run

    @property
    def name(self) -> str:
        """A short name for people."""
        parts = [*(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.params.items())]
        parts += [f"fold {self.fold}"] if self.fold is not None else []
        parts += [f"seed {self.run.seed}"]
        of = "" if self.condition == ONLY_CONDITION else f"{self.condition}: "
        return of + ", ".join(parts)

    def as_tree(self) -> Tree:
        """Plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"run": to_tree(self.run)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, source: str) -> "Trial":
        """The inverse of ``as_tree``."""
        return cls(**{**tree, "run": build(Run, tree["run"], source=source)})


def trial_id(run: Run, fingerprint: str) -> str:
    """Hash of everything that decides a training's result, short enough for a folder name."""
    tree = to_tree(run)
    tree.pop("name")
    for key in ("store", "simulate"):
        tree["data"].pop(key)
    tree["optim"].pop("preset")  # the keys that it sets are in the tree
    for key in NOT_LEARNT:
        tree["trainer"].pop(key)
    return digest([fingerprint, tree])[:16]


def sequence_digest(names: Sequence[str]) -> str:
    """Name of a pack: the hash of the trials in it, in order."""
    return digest(list(names))[:16]
