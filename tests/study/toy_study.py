"""A study of four small trials on a store of the toy cohort."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from modis_dist.config import parse, yaml12
from modis_dist.config.study import Study
from modis_dist.data.store.writer import StoreWriter
from modis_dist.execution.local import LocalExecutor
from modis_dist.study.plan import plan
from modis_dist.study.run import run_study
from tests.train import toy

COMMAND = [sys.executable, "-m", "modis_dist"]
BARE = [sys.executable, str(Path(__file__).parents[1] / "bare.py"), "-m", "modis_dist"]  # without figures


def write_store(path: Path, *, samples: int = 90, labels: bool = True, blind: int = 0) -> Path:
    """Write the toy cohort as a store; the first ``blind`` samples are unlabelled test rows, the others train."""
    cohort = toy.cohort(samples=samples)
    with StoreWriter(path, source={"kind": "toy"}) as writer:
        for modality, index in cohort.selection.index.items():
            tested = [int(name.removeprefix("s")) < blind for name in index.sample_id]
            writer.begin(modality, cohort.features[modality])
            writer.write(
                modality,
                sample_id=list(index.sample_id),
                group_id=list(index.group_id),
                label=[
                    toy.CLASSES[k] if labels and k >= 0 and not unseen else None
                    for k, unseen in zip(index.label, tested, strict=True)
                ],
                split=[("test" if unseen else "train") if blind else "" for unseen in tested],
                x=cohort.x[modality],
            )
    return path


def tree(store: Path, **sweep: Any) -> dict[str, Any]:
    """Return the study as plain values; it is tracked only if ``mlflow`` is given."""
    base = json.loads(json.dumps(toy.TREE))
    base["data"]["store"] = str(store)
    settings = {"grid": {"objective.beta": [1e-4, 1e-2]}, "folds": 2, "executor": "local"}
    settings |= {"mlflow": {"enabled": False}} | sweep
    return base | {"sweep": settings}


class Silent:
    """A display that shows nothing."""

    def stage(self, name: str, *, trials: int, epochs: int) -> None: ...

    def update(self, *, epochs: int, done: int, failed: int) -> None: ...


def run_toy_study(out: Path, store: Path, *overrides: str, **sweep: Any) -> dict[str, Any]:
    """Train the study in this process and return its summary."""
    torch.set_num_threads(1)
    study = parse.build(Study, parse.with_overrides(tree(store, **sweep), overrides), source="study.yaml")
    planned = plan(study, out=out, slots=1, source="study.yaml")
    executor = LocalExecutor(study.sweep.resources)
    return run_study(planned, out=out, executor=executor, display=Silent())


def write_study(path: Path, store: Path, **sweep: Any) -> Path:
    """Write the study as a YAML file and return its path."""
    path.write_text(yaml12.dump(tree(store, **sweep)))
    return path
