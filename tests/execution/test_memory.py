"""Number of concurrent packs: memory of the job, memory of a pack, and the limit from both."""

import logging
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from modis_dist.config.parse import build
from modis_dist.config.run import Run
from modis_dist.config.study import Study
from modis_dist.data.store.reader import Store
from modis_dist.execution import memory
from modis_dist.execution.memory import (
    CONTEXT,
    ConcurrencyLimit,
    Footprint,
    estimate_host_bytes,
    measure,
    memory_limit,
    packs_that_fit,
)
from modis_dist.execution.resources import Cluster, Node
from modis_dist.execution.run_pack import Pack
from modis_dist.study.plan import plan
from modis_dist.train import placement
from tests.devices import DEVICES
from tests.study.toy_study import tree, write_store

GB = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", samples=60)


def packs_of(store: Path, out: Path, **settings: object) -> list[Pack]:
    """Packs of one trial each, with some settings of the run changed."""
    settings_of_study = tree(store, packing={"enabled": False})
    for section, values in settings.items():
        settings_of_study[section] = settings_of_study[section] | values
    study = build(Study, settings_of_study, source="study.yaml")
    return plan(study, out=out, slots=1, source="study.yaml").packs()


@pytest.mark.parametrize(
    ("groups", "root", "file"),
    [
        ("0::/job_7/step_0\n", "", "memory.max"),
        ("9:name=systemd:/job_7\n4:cpu,memory:/job_7/step_0\n0::/\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_the_memory_limit_is_the_smallest_of_its_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, root: str, file: str
) -> None:
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(placement, "PROCESS_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(placement, "CGROUPS", tmp_path / "fs")
    assert memory_limit() == psutil.virtual_memory().total
    step = tmp_path / "fs" / root / "job_7" / "step_0"
    step.mkdir(parents=True)
    (step / file).write_text("max\n" if root == "" else f"{2**63}\n")
    assert memory_limit() == psutil.virtual_memory().total
    (step.parent / file).write_text("123456789\n")
    assert memory_limit() == 123456789


@pytest.mark.parametrize("device", DEVICES)
def test_the_measured_footprint_grows_with_the_model_and_leaves_no_files(
    device: str, store: Path, tmp_path: Path
) -> None:
    (small, *_), (large, *_) = (
        packs_of(store, tmp_path, trainer={"device": device}),
        packs_of(store, tmp_path, trainer={"device": device}, model={"discriminator": [4096, 4096]}),
    )
    before = sorted(tmp_path.iterdir())
    of_small, of_large = (measure(pack, threads=1, out=tmp_path, store=store) for pack in (small, large))
    assert of_small is not None and of_large is not None
    parameters = 4 * 4096 * 4096  # bytes of the largest matrix; also two moments and the best model
    grown = of_large.gpu - of_small.gpu if device == "cuda" else of_large.host - of_small.host
    assert 4 * parameters < grown < 16 * parameters
    assert of_small.host > 200e6
    if device == "cuda":
        assert CONTEXT < of_small.gpu < of_large.gpu < of_small.gpu_total
    else:
        assert of_small.host < 3 * estimate_host_bytes(small, Store.open(store)) and of_small.gpu == 0
    assert sorted(tmp_path.iterdir()) == before


def fit(packs: list[Pack], limit: ConcurrencyLimit, folder: Path, store: Path, **changes: object) -> ConcurrencyLimit:
    """Call ``packs_that_fit`` for a machine of 64 cores, with some changes."""
    settings = {"machine": Cluster("here", (Node(64),)), "workers": 1, "threads": 1, "known": {}} | changes
    return packs_that_fit(packs, limit, out=folder, store=store, **settings)


def test_packs_that_certainly_fit_are_not_measured(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(memory, "memory_limit", lambda: 1000 * GB)
    packs = packs_of(store, tmp_path)
    assert fit(packs, ConcurrencyLimit(8), tmp_path, store) == ConcurrencyLimit(8)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1)
    assert fit(packs, ConcurrencyLimit(1), tmp_path, store, workers=4) == ConcurrencyLimit(1)  # nothing to lower
    assert fit(packs[:1], ConcurrencyLimit(1, 4), tmp_path, store) == ConcurrencyLimit(1)  # alone on its GPU


TWO_NODES = Cluster("there", (Node(8), Node(8)))
TWO_GPUS = Cluster("there", (Node(8, 2),))


@pytest.mark.parametrize(
    ("footprint", "limit", "changes", "right", "message"),
    [
        (Footprint(2 * GB), ConcurrencyLimit(8), {}, ConcurrencyLimit(4), "4 pack(s) at a time instead of 8"),
        (
            Footprint(2 * GB),
            ConcurrencyLimit(8),
            {"workers": 2},
            ConcurrencyLimit(2),
            "2 pack(s) of 2 workers at a time instead of 8",
        ),
        (Footprint(2 * GB), ConcurrencyLimit(3), {}, ConcurrencyLimit(3), ""),
        (
            Footprint(5 * GB),
            ConcurrencyLimit(8),
            {"machine": TWO_NODES},
            ConcurrencyLimit(2),
            "2 pack(s) at a time",
        ),  # 1.6 on each node, rounded down to 1
        (
            Footprint(90 * GB),
            ConcurrencyLimit(8),
            {},
            ConcurrencyLimit(1),
            "1 pack(s) at a time",
        ),  # at least one; training it reports the error
        (
            Footprint(1 * GB, 9 * GB, 40 * GB),
            ConcurrencyLimit(8, 4),
            {"machine": TWO_GPUS},
            ConcurrencyLimit(6, 3),
            "3 pack(s) per GPU, 6 at",
        ),
        (
            Footprint(1 * GB, 50 * GB, 40 * GB),
            ConcurrencyLimit(8, 4),
            {"machine": TWO_GPUS},
            ConcurrencyLimit(2, 1),
            "1 pack(s) per GPU, 2 at",
        ),
        (None, ConcurrencyLimit(8, 4), {}, ConcurrencyLimit(1, 1), "one pack is trained at a time"),
    ],
)
def test_concurrency_is_limited_by_memory_of_nodes_and_gpus(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    footprint: Footprint | None,
    limit: ConcurrencyLimit,
    changes: dict[str, object],
    right: ConcurrencyLimit,
    message: str,
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: 10 * GB)
    monkeypatch.setattr(memory, "estimate_host_bytes", lambda *_: GB)
    monkeypatch.setattr(memory, "measure", lambda *_, **__: footprint)
    with caplog.at_level(logging.WARNING):
        assert fit(packs_of(store, tmp_path), limit, tmp_path, store, **changes) == right
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (1 if message else 0) and all(message in line and "\n" not in line for line in warnings)


def test_a_measurement_is_reused_for_packs_that_are_not_larger(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements: list[int] = []
    sizes = iter([2, 2, 1, 1, 3, 3])
    monkeypatch.setattr(memory, "memory_limit", lambda: 10)
    monkeypatch.setattr(memory, "estimate_host_bytes", lambda *_: next(sizes))
    monkeypatch.setattr(memory, "measure", lambda *_, **__: measurements.append(1) or Footprint(len(measurements)))
    pack, known = packs_of(store, tmp_path)[:1], {}
    packs_at_once = [fit(pack, ConcurrencyLimit(8), tmp_path, store, known=known).packs for _ in range(3)]
    assert (packs_at_once, len(measurements), sorted(known)) == ([8, 8, 4], 2, [2, 3])


def test_a_failed_measurement_does_not_fail_the_study(store: Path, tmp_path: Path) -> None:
    pack, *_ = packs_of(store, tmp_path)
    missing = replace(pack, trials=(replace(pack.trials[0], run=fp16(pack.trials[0].run)),))
    assert measure(missing, threads=1, out=tmp_path, store=store) is None


def fp16(run: Run) -> Run:
    """The run in a precision that needs a GPU."""
    return run.model_copy(update={"trainer": run.trainer.model_copy(update={"precision": "fp16"})})
