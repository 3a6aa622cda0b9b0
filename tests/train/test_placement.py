"""Features in memory, on disk, on the device or on the host: the same batches and results, less memory."""

import json
import mmap
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modis_dist.config.run import Run
from modis_dist.data.store import writer as writer_module
from modis_dist.data.store.arrays import FeatureStorage
from modis_dist.data.store.reader import Store
from modis_dist.evaluate.evaluate_folder import evaluate_folder
from modis_dist.evaluate.results import HeldOut
from modis_dist.execution import run_pack
from modis_dist.execution.memory import estimate_host_bytes, on_disk
from modis_dist.execution.run_pack import Pack, kinds_of_data
from modis_dist.execution.single import train_run
from modis_dist.execution.verify_resume import differences
from modis_dist.model.networks import Modis
from modis_dist.runtime.errors import DataError
from modis_dist.train import loader as loader_module
from modis_dist.train import placement, validation
from modis_dist.train.callbacks import NeverStop, NullReporter
from modis_dist.train.loader import Loader
from modis_dist.train.placement import choose_storage, fits_beside_training, gather_to_device, rows_at_once, storage_of
from modis_dist.train.prepare import Prepared, load_cohort, prepare, selections, shape
from modis_dist.train.validation import ValidationRows
from tests.bare import skip_figures
from tests.execution.test_memory import packs_of
from tests.study.toy_study import run_toy_study, write_store
from tests.train import toy

BESIDE = torch.device("cpu", 0)  # another name of the host, not equal to ``cpu``
GB = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Write the toy store in row groups of 16 rows, two per shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_ROWS", 16)
        patch.setattr(writer_module, "SHARD_BYTES", 2 * 16 * 12 * 4)
        return Store.open(write_store(tmp_path_factory.mktemp("data") / "store"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary folder of this test, also in child processes."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def in_place(run: Run, store: Store, storage: FeatureStorage) -> Prepared:
    return prepare(run, load_cohort(store, run.data, storage=storage), test=True)


def loader_of(prepared: list[Prepared], runs: list[Run]) -> Loader:
    return Loader(
        prepared,
        [run.seed for run in runs],
        batch_size=runs[0].optim.batch_size,
        epoch_length=runs[0].optim.epoch_length,
        min_labelled_fraction=runs[0].optim.min_labelled_fraction,
        latent=4,
        signs=True,
        device=toy.CPU,
        dtype=torch.float32,
    )


# --- choice of storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "needed", "limit", "right"),
    [
        ("auto", 4 * GB, 10 * GB, "memory"),
        ("auto", 4 * GB + 1, 10 * GB, "disk"),
        ("memory", 90 * GB, 10 * GB, "memory"),
        ("disk", 1, 10 * GB, "disk"),
    ],
)
def test_features_are_stored_on_disk_if_memory_is_short_or_on_request(
    asked: str, needed: int, limit: int, right: str
) -> None:
    assert choose_storage(asked, needed, limit=limit) == right


@pytest.mark.parametrize(("needed", "free", "right"), [(39, 80, True), (40, 80, True), (41, 80, False), (0, 0, True)])
def test_features_are_kept_on_a_gpu_if_they_leave_half_of_its_free_memory(needed: int, free: int, right: bool) -> None:
    assert fits_beside_training(needed * GB, free=free * GB) is right


@pytest.mark.parametrize(("free", "kept_on"), [(80 * GB, "cuda"), (1 * GB, "cpu")])
def test_data_that_do_not_fit_on_a_gpu_stay_on_the_host(
    monkeypatch: pytest.MonkeyPatch, free: int, kept_on: str
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free - 2 * GB, 90 * GB))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 3 * GB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 1 * GB)
    assert placement.storage_device(8 * GB, torch.device("cuda")).type == kept_on
    assert placement.storage_device(8 * GB, toy.CPU) == toy.CPU


@pytest.mark.parametrize(("features", "rows"), [(5, 2048), (8192, 2048), (20_000, 838), (10**7, 64)])
def test_wide_rows_are_evaluated_in_smaller_batches(features: int, rows: int) -> None:
    assert rows_at_once(features, max_rows=2048) == rows


def test_the_memory_of_a_pack_does_not_include_features_on_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, *_ = packs_of(store.path, tmp_path)
    run = pack.trials[0].run
    in_memory = estimate_host_bytes(pack, store)
    monkeypatch.setattr(placement, "memory_limit", lambda: 1000)
    assert (storage_of(run, store), in_memory - estimate_host_bytes(pack, store)) == (
        "disk",
        placement.resident_bytes(run, store),
    )


@pytest.mark.parametrize("evaluated_on", ["validation", "test"])
def test_the_scratch_space_of_a_pack_is_that_of_its_folds_and_one_baseline(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated_on: HeldOut
) -> None:
    first_pack, *others = packs_of(store.path, tmp_path, trainer={"feature_storage": "disk"})
    other = next(pack for pack in others if pack.trials[0].fold != first_pack.trials[0].fold)
    pack = Pack((*first_pack.trials, *other.trials), evaluated_on)
    asked: list[int] = []
    written: list[int] = []
    genuine = mmap.mmap
    monkeypatch.setattr("modis_dist.train.prepare.refuse_insufficient_scratch", asked.append)
    monkeypatch.setattr("mmap.mmap", lambda file, size: written.append(size) or genuine(file, size))
    run_pack.prepare_members(pack, run_pack.study_layout(tmp_path, pack).trials, store=store.path)
    of_fold = [sum(part) for part in np.split(np.array(written), 2)]
    assert len(asked) == kinds_of_data(pack) == 2
    of_baseline = [total - of_training for total, of_training in zip(asked, of_fold, strict=True)]
    assert on_disk(pack, store, selections(store)) == sum(of_fold) + max(of_baseline)


def test_feature_storage_depends_on_the_memory_limit(store: Store, tmp_path: Path) -> None:
    pack, *_ = packs_of(store.path, tmp_path)
    assert on_disk(pack, store, selections(store)) == 0 < on_disk(pack, store, selections(store), limit=1000)


# --- the same batches and results ---------------------------------------------------------------------------

SCENARIOS = [
    [],
    ["unpair"],
    [{"kind": "hide_labels", "fraction": 0.8}],
    [{"kind": "cut_class", "label": "a", "rows": 3}, {"kind": "subsample", "fraction": 0.7}],
    [{"kind": "drop_pairs", "pairs": [{"label": "b", "modality": "rppa"}]}],
]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scenario=st.sampled_from(SCENARIOS),
    modalities=st.sampled_from([["mirna", "cnv", "rppa"], ["rppa", "mirna"]]),
    steps=st.sampled_from([["standardise"], ["minmax", {"kind": "variance_filter", "features": 5}], []]),
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    batch_size=st.integers(2, 20),
    ends=st.sampled_from(["shortest", "longest"]),
)
def test_batches_are_bit_identical_wherever_features_are_stored(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    scenario: list[object],
    modalities: list[str],
    steps: list[object],
    seeds: list[int],
    batch_size: int,
    ends: str,
) -> None:
    settings_of = [f"optim.batch_size={batch_size}", f"optim.epoch_length={ends}", f"data.modalities={modalities}"]
    runs = [toy.run(*settings_of, f"seed={seed}", scenario=scenario, preprocess={"default": steps}) for seed in seeds]
    resident = [in_place(run, store, "memory") for run in runs]
    streamed = [in_place(run, store, "disk") for run in runs]
    for one, other in zip(resident, streamed, strict=True):
        for name in ("train", "validation", "test"):
            theirs = getattr(other, name).x
            assert all(x.tobytes() == theirs[m].tobytes() for m, x in getattr(one, name).x.items())
    loaders = [loader_of(resident, runs), loader_of(streamed, runs)]
    with monkeypatch.context() as patch:
        patch.setattr(loader_module, "storage_device", lambda *_: BESIDE)
        loaders.append(loader_of(streamed, runs))
    for epoch, step in ((0, 0), (1, loaders[0].steps - 1)):
        expected, *batches = (loader.batch(epoch=epoch, step=step) for loader in loaders)
        for batch in batches:
            assert all(torch.equal(a, b) for a, b in zip(batch.x, expected.x, strict=True))
            assert all(torch.equal(getattr(batch, n), getattr(expected, n)) for n in ("label", "noise_d", "signs"))


def test_rows_gathered_on_the_host_are_the_requested_ones() -> None:
    x = [torch.arange(12.0).view(6, 2), torch.arange(12.0, 24.0).view(6, 2)]
    rows = torch.tensor([[5, 0, 5], [1, 2, 3]])
    assert torch.equal(gather_to_device(x, rows, device=toy.CPU), torch.stack([x[r][rows[r]] for r in range(2)]))


@pytest.mark.parametrize("same_rows", [True, False])
def test_validation_is_bit_identical_wherever_rows_are_stored_and_in_parts_of_any_size(
    store: Store, monkeypatch: pytest.MonkeyPatch, same_rows: bool
) -> None:
    runs = [toy.run() if same_rows else toy.run(f"data.split.seed={seed}") for seed in range(3)]
    sets = {storage: [in_place(run, store, storage) for run in runs] for storage in ("memory", "disk")}
    if same_rows:
        sets = {storage: [validation_rows[0]] * 3 for storage, validation_rows in sets.items()}
    else:
        cut = {m: x[:-2] for m, x in sets["disk"][0].validation.x.items()}
        for validation_rows in sets.values():  # slots with fewer rows are padded
            short = validation_rows[0].validation
            label = {m: y[:-2] for m, y in short.label.items()}
            validation_rows[0] = replace(validation_rows[0], validation=replace(short, x=cut, label=label))
    torch.manual_seed(0)
    model = Modis(shape(runs[0], toy.SIZES, 3), slots=3)
    figures = []
    for storage, beside, rows in (("memory", toy.CPU, 2048), ("disk", toy.CPU, 2048), ("disk", BESIDE, 2048)):
        with monkeypatch.context() as patch:
            patch.setattr(validation, "storage_device", lambda *_, beside=beside: beside)
            patch.setattr(validation, "ROWS_AT_ONCE", rows)
            figures.append(ValidationRows(sets[storage], device=toy.CPU, dtype=torch.float32).validate(model))
    assert figures[0] == figures[1] == figures[2]
    monkeypatch.setattr(validation, "rows_at_once", lambda *_, **__: 5)
    in_parts = ValidationRows(sets["disk"], device=toy.CPU, dtype=torch.float32).validate(model)
    for metric, expected in zip(in_parts, figures[0], strict=True):
        assert metric == pytest.approx(expected, rel=1e-5)


def trained(store: Store, out: Path, storage: FeatureStorage) -> Path:
    run = toy.run("trainer.feature_storage=" + storage, f"data.store={store.path}")
    train_run(run, out=out, source="run.yaml", reporter=NullReporter(), stop=NeverStop())
    return out


def test_a_training_and_its_evaluation_are_bit_identical_and_leave_no_file(
    store: Store, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_figures(monkeypatch)
    in_memory, on_disk = (trained(store, tmp_path / storage, storage) for storage in ("memory", "disk"))
    assert differences(in_memory, on_disk) == []
    of_memory, of_disk = (json.loads((folder / "result.json").read_text()) for folder in (in_memory, on_disk))
    assert of_memory == of_disk and of_memory["baseline"]["n"] > 0
    assert evaluate_folder(in_memory, store.path) == evaluate_folder(on_disk, store.path)
    elsewhere = write_store(tmp_path / "other", samples=120)
    assert evaluate_folder(in_memory, elsewhere) == evaluate_folder(on_disk, elsewhere)
    assert not any(path.is_file() for path in scratch.rglob("*"))


def test_a_study_has_the_same_trials_and_metrics_wherever_features_are_stored(
    store: Store, tmp_path: Path, scratch: Path
) -> None:
    in_memory, on_disk = (
        run_toy_study(tmp_path / storage, store.path, "optim.epochs=2", f"trainer.feature_storage={storage}")
        for storage in ("memory", "disk")
    )
    assert in_memory["failures"] == on_disk["failures"] == {} and in_memory["groups"] == on_disk["groups"]
    assert not any(path.is_file() for path in scratch.rglob("*"))


def test_a_training_without_enough_scratch_space_is_refused_before_it_starts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[int] = []

    def refuse(needed: int) -> None:
        requested.append(needed)
        raise DataError("no room")

    monkeypatch.setattr("modis_dist.train.prepare.refuse_insufficient_scratch", refuse)
    with pytest.raises(DataError, match="no room"):
        trained(store, tmp_path / "run", "disk")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    prepared = in_place(toy.run(), store, "memory")
    sizes = {m: sum(getattr(prepared, part).x[m].nbytes for part in ("train", "validation")) for m in toy.SIZES}
    assert requested == [sum(sizes.values()) + max(sizes.values())]
