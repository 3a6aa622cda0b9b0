"""Opening a trained model read-only, refusing damaged models, evaluation on a device, rows shared by members."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modis_dist.evaluate import evaluation
from modis_dist.evaluate.evaluation import evaluate_training
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.results import write_result
from modis_dist.model.networks import Modis
from modis_dist.runtime.errors import DataError
from modis_dist.train import checkpoint
from modis_dist.train.prepare import prepare, shape
from modis_dist.train.progress import Progress
from modis_dist.train.validation import ValidationRows
from tests.train import toy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with ``best`` of one epoch; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    toy.train([toy.member("t", toy.run("optim.epochs=1"), folder)], folder)
    return folder / "t"


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "t"))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, and the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def damage(model: Path) -> Path:
    (best,) = (model / "best").iterdir()
    (best / "state.json").write_text("{}")
    return best


def test_opening_a_damaged_model_changes_nothing_and_names_the_file(model: Path) -> None:
    best = damage(model)
    (model / "best" / ".step-00000099.7.tmp").mkdir()  # left by a training that is saving
    before = snapshot(model)
    with pytest.raises(DataError, match=r"state\.json") as refused:
        Predictor.open(model)
    assert str(best) in str(refused.value) and "to start again" not in str(refused.value)
    assert snapshot(model) == before


@pytest.mark.parametrize("sound", [True, False])
def test_a_model_in_a_read_only_folder_is_opened_or_refused_by_file(model: Path, sound: bool) -> None:
    if not sound:
        damage(model)
    folders = [p for p in [model, *model.rglob("*")] if p.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        if sound:
            assert Predictor.open(model).trial == "t"
        else:
            with pytest.raises(DataError, match=r"state\.json"):
                Predictor.open(model)
    finally:
        for folder in folders:
            folder.chmod(0o700)


def test_an_older_model_is_named_but_never_loaded_in_place_of_a_damaged_one(model: Path) -> None:
    best = damage(model)
    older = checkpoint.Checkpoint(1, {"model": {"w": torch.zeros(1)}}, {})
    shutil.move(checkpoint.save(model / "elsewhere", older), best.parent)
    with pytest.raises(DataError, match="step-00000001"):
        Predictor.open(model)


def test_a_checkpoint_replaced_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(step: int) -> Path:
        return checkpoint.save(tmp_path, checkpoint.Checkpoint(step, {"model": {"w": torch.zeros(1)}}, {}))

    first, judge, calls = saved(1), checkpoint.problem, []

    def problem(path: Path) -> str | None:
        if not calls:
            calls.append(path)
            saved(2)
        return judge(path)

    monkeypatch.setattr(checkpoint, "problem", problem)
    latest = checkpoint.latest(tmp_path)
    assert calls == [first] and latest == tmp_path / "step-00000002"


def test_a_frame_without_numbers_is_refused_by_name(model: Path) -> None:
    predictor = Predictor.open(model)
    x = toy.cohort().x["cnv"][:2]
    frame = pd.DataFrame(x, columns=list(predictor.features("cnv")))
    twice = pd.concat([frame, frame[["cnv3"]]], axis=1)
    for inputs, message in ((x, "DataFrame"), (twice, "cnv3")):
        with pytest.raises(DataError, match=message):
            predictor.predict(inputs, modality="cnv")
    with pytest.raises(DataError, match="finite"):
        predictor.predict(frame.astype(float).assign(cnv0=1e39), modality="cnv")


def test_a_folder_without_a_checkpoint_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None


# --- evaluation ------------------------------------------------------------------------------------------------


def test_a_training_is_evaluated_on_the_device_it_ran_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def opened(folder: Path, *, device: str | torch.device = "cpu") -> Predictor:
        devices.append(torch.device(device))
        return Predictor.open(folder)

    monkeypatch.setattr(evaluation, "Predictor", type("Spy", (), {"open": staticmethod(opened)}))
    member = toy.member("t", toy.run("optim.epochs=1"), model.parent)
    done = Progress("t", status="done", epochs=1)
    settings = {"evaluated_on": "validation", "probe": False, "baselines": {}}
    evaluate_training(member, done, device=torch.device("cuda", 1), **settings)
    evaluate_training(member, done, **settings)
    assert devices == [torch.device("cuda", 1), torch.device("cpu")]


def refused(constant: str) -> None:
    raise AssertionError(constant)


def test_validation_errors_that_overflow_are_no_improvement_and_every_file_stays_strict_json(tmp_path: Path) -> None:
    run = toy.run("trainer.metric=reconstruction_mse", "optim.epochs=2")
    prepared = prepare(run, toy.cohort())
    assert prepared.validation is not None
    huge = np.full_like(prepared.validation.x["cnv"], 1e25)  # its square overflows float32
    rows = replace(prepared.validation, x={**prepared.validation.x, "cnv": huge})
    member = toy.member("t", run, tmp_path, prepared=replace(prepared, validation=rows))
    (progress,) = toy.train([member], tmp_path)
    assert progress.status == "done" and progress.best_epoch is None and progress.best_value is None
    assert all("val/reconstruction_mse/mirna" in row for row in progress.history)
    assert not any("val/reconstruction_mse" in row for row in progress.history)
    settings = {"evaluated_on": "validation", "probe": False, "baselines": {}}
    write_result(member.folder, evaluate_training(member, replace(progress, status="failed"), **settings))
    written = [*tmp_path.rglob("*.json")]
    assert {"result.json", "history.json", "state.json"} <= {path.name for path in written}
    for path in written:
        json.loads(path.read_text(), parse_constant=refused)


def test_members_with_the_same_rows_share_one_copy_and_get_the_metrics_of_separate_ones() -> None:
    run = toy.run()
    shared = prepare(run, toy.cohort())
    model = Modis(shape(run, toy.SIZES, 3), slots=3, dtype=torch.float64)
    metrics, sizes = [], []
    for prepared in ([shared] * 3, [replace(shared, validation=replace(shared.validation)) for _ in range(3)]):
        rows = ValidationRows(prepared, device=toy.CPU, dtype=torch.float64)  # float32 rows would not be copied
        distinct = {x.data_ptr(): x for parts in rows._x.values() for x in parts}
        sizes.append(sum(x.nbytes for x in distinct.values()))
        metrics.append(rows.validate(model))
    assert sizes[1] == 3 * sizes[0] == 3 * 2 * sum(x.nbytes for x in shared.validation.x.values())
    for of_shared, of_separate in zip(*metrics, strict=True):
        assert of_shared == pytest.approx(of_separate, rel=1e-5)
