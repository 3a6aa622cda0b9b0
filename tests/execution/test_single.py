"""A single run: the rows its model is evaluated on, and files written with its model."""

import errno
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from modis_dist.cli.main import run as command
from modis_dist.config import yaml12
from modis_dist.config.parse import load_run
from modis_dist.data.store.index import Index
from modis_dist.data.store.reader import Store
from modis_dist.data.store.writer import StoreWriter
from modis_dist.evaluate.batch_predict import apply_to_store
from modis_dist.evaluate.evaluate_folder import TrainingIds, evaluate_folder, training_ids
from modis_dist.evaluate.predictor import Predictor
from modis_dist.execution import run_pack, single
from modis_dist.execution.resource_errors import disk_errors
from modis_dist.runtime.errors import DataError, DiskFailed
from modis_dist.train.prepare import load_cohort, prepare
from tests.study.toy_study import write_store
from tests.train import toy

Captured = pytest.CaptureFixture[str]


def write_run(path: Path, **data: object) -> Path:
    """Write a run of two epochs."""
    tree = json.loads(json.dumps(toy.TREE))
    tree["data"] |= data
    tree["optim"]["epochs"] = 2
    path.write_text(yaml12.dump(tree))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, trained on ``store``; copy before changing."""
    folder = tmp_path_factory.mktemp("single")
    file = write_run(folder / "run.yaml", store=str(write_store(folder / "store")))
    assert command(["train", str(file), "--out", str(folder / "run"), "--json"]) == 0
    return folder


def sample_ids(folder: Path) -> set[str]:
    """Sample ids of the training rows; in the toy every sample is its own group."""
    run = load_run(folder / "run" / "run.yaml")
    train = prepare(run, load_cohort(Store.open(folder / "store"), run.data, storage="memory")).train
    return {str(name) for names in train.sample_id.values() for name in names}


# --- evaluation ---------------------------------------------------------------------------------------------


def test_training_rows_are_excluded_from_another_store(done: Path, tmp_path: Path, capsys: Captured) -> None:
    other = Store.open(write_store(tmp_path / "other", samples=120))
    ids = [name for m in other.modalities for name in other.index(m).sample_id]
    known = sum(name in sample_ids(done) for name in ids)
    scores = evaluate_folder(done / "run", other.path)
    counted = scores["evaluation"]["classification"]
    assert 100 < known == scores["training_rows_left_out"]
    assert scores["rows"] == "all" and counted["n"] + counted["unlabelled"] == len(ids) - known
    capsys.readouterr()
    assert command(["evaluate", str(done / "run"), str(other.path)]) == 0
    assert f"note: {known} rows " in capsys.readouterr().err


def test_without_the_training_store_evaluate_warns_that_training_rows_may_be_included(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(done / "run", tmp_path / "run")
    settings = tmp_path / "run" / "run.yaml"
    settings.write_text(settings.read_text().replace(str(done / "store"), str(tmp_path / "moved")))
    other = write_store(tmp_path / "other", samples=60)
    assert evaluate_folder(tmp_path / "run", other)["training_rows_left_out"] is None
    capsys.readouterr()
    assert command(["evaluate", str(tmp_path / "run"), str(other)]) == 0
    assert "warning: " in capsys.readouterr().err
    write_store(tmp_path / "moved", samples=60)  # exists, but is not the training store
    assert evaluate_folder(tmp_path / "run", other)["training_rows_left_out"] is None


def test_on_its_own_store_all_training_rows_are_excluded(done: Path) -> None:
    scores = evaluate_folder(done / "run", done / "store")
    result = json.loads((done / "run" / "result.json").read_text())
    assert scores["rows"] == "test"
    assert scores["training_rows_left_out"] == sum(result["training_rows"].values())


def test_a_store_of_training_rows_only_is_refused(done: Path, tmp_path: Path) -> None:
    store, known = Store.open(done / "store"), sample_ids(done)
    with StoreWriter(tmp_path / "known", source={"kind": "toy"}) as writer:
        for modality in store.modalities:
            index = store.index(modality)
            rows = np.flatnonzero([name in known for name in index.sample_id])
            part = index.take(rows)
            writer.begin(modality, store.features(modality))
            writer.write(
                modality,
                sample_id=list(part.sample_id),
                group_id=list(part.group_id),
                label=[store.classes[k] if k >= 0 else None for k in part.label],
                split=[""] * len(part),
                x=store.read(modality, rows),
            )
    with pytest.raises(DataError, match="known"):
        evaluate_folder(done / "run", tmp_path / "known")


def test_a_row_is_known_by_its_sample_or_by_its_patient() -> None:
    samples, groups = np.array(["a", "b", "c", "p"], object), np.array(["x", "p", "y", "z"], object)
    index = Index(samples, groups, np.zeros(4, np.int64), np.full(4, "", object))
    assert list(TrainingIds(frozenset({"a"}), frozenset({"p"})).contain(index)) == [True, True, False, False]


@pytest.mark.parametrize("where", ["run", "trials/one"])
def test_a_simulated_training_store_is_found_beside_the_run_or_in_its_study(tmp_path: Path, where: str) -> None:
    file = write_run(tmp_path / "run.yaml", simulate={"samples": 60, "classes": 3, "seed": 5})
    run = tmp_path / "out" / where
    assert command(["train", str(file), "--out", str(run), "--json", "--set", "optim.epochs=1"]) == 0
    if where != "run":
        shutil.move(next(run.glob("store-*")), tmp_path / "out")
    learnt = training_ids(load_run(run / "run.yaml"), Predictor.open(run))
    rows = json.loads((run / "result.json").read_text())["training_rows"]
    assert learnt is not None and len(learnt.samples) >= max(rows.values())


def test_a_run_without_validation_rows_names_the_command_that_evaluates_it(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "refit"
    fixed = ["--set", "data.split.validation_fraction=0"]
    assert command(["train", str(done / "run.yaml"), "--out", str(out), *fixed]) == 0
    output = capsys.readouterr().out
    assert "2 epochs" in output and "validation" in output and "None" not in output
    line = next(line for line in output.splitlines() if "modis-dist evaluate" in line)
    assert command(line.split("modis-dist ")[1].split()) == 0, "the suggested command fails"
    assert "Metrics on test rows" in capsys.readouterr().out


def test_training_rows_are_identified_by_the_data_not_by_the_hash_of_settings(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "trial_id", lambda *_: "of another version")
    assert evaluate_folder(done / "run", done / "store")["rows"] == "test"


def test_a_run_file_that_was_edited_does_not_define_the_training_split(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", tmp_path / "run")
    file = tmp_path / "run" / "run.yaml"
    tree = yaml12.read(file)
    tree["data"]["split"]["seed"] = 5
    file.write_text(yaml12.dump(tree))
    scores = evaluate_folder(tmp_path / "run", done / "store")
    assert (scores["rows"], scores["training_rows_left_out"]) == ("all", None), "training rows may be among them"


def test_a_refused_training_writes_nothing_and_a_store_is_refused_as_output(
    done: Path, tmp_path: Path, capsys: Captured
) -> None:
    file, out = str(done / "run.yaml"), tmp_path / "out"
    assert command(["train", file, "--out", str(out), "--set", "model.classes=5"]) == 2
    assert re.search(r"model\.classes: .*\b5\b.*\b3\b", capsys.readouterr().err) and not out.exists()
    before = sorted((done / "store").rglob("*"))
    assert command(["train", file, "--out", str(done / "store")]) == 2
    assert (
        f"{done / 'store'}: contains a store" in capsys.readouterr().err
        and sorted((done / "store").rglob("*")) == before
    )


# --- files written with the model ----------------------------------------------------------------------------


def test_a_file_is_replaced_atomically_private_and_never_through_a_link(done: Path, tmp_path: Path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "p.parquet"
    victim.write_text("mine")
    out.symlink_to(victim)
    assert command(["predict", str(done / "run"), str(done / "store"), "--out", str(out)]) == 0
    assert victim.read_text() == "mine" and not out.is_symlink()
    assert pq.read_metadata(out).num_rows == 90 + 90 + 60
    assert out.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.parquet", "victim"]


def test_a_link_planted_at_a_temporary_name_is_not_written_through(done: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".p.parquet.tmp").symlink_to(victim)
    assert command(["embed", str(done / "run"), str(done / "store"), "--out", str(tmp_path / "p.parquet")]) == 0
    assert victim.read_text() == "mine"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    predict = Predictor.predict

    def failing(self: Predictor, frame: pd.DataFrame, *, modality: str) -> pd.DataFrame:
        if modality == "rppa":
            raise DataError("the third modality fails")
        return predict(self, frame, modality=modality)

    monkeypatch.setattr(Predictor, "predict", failing)
    out = tmp_path / "p.parquet"
    out.write_text("old")
    assert command(["predict", str(done / "run"), str(done / "store"), "--out", str(out)]) == 2
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    assert capsys.readouterr().err == "error: the third modality fails\n"


def test_a_store_without_rows_is_refused(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(Store, "rows", lambda *_: 0)
    out = tmp_path / "p.parquet"
    assert command(["predict", str(done / "run"), str(done / "store"), "--out", str(out)]) == 2
    assert "mirna, cnv, rppa" in capsys.readouterr().err and not out.exists()


def test_progress_is_reported_up_to_the_last_row(done: Path, tmp_path: Path) -> None:
    model, progress_calls = Predictor.open(done / "run"), []
    apply_to_store(
        model,
        Store.open(done / "store"),
        out=tmp_path / "e.parquet",
        predict=lambda frame, modality: model.embed(frame, modality=modality),
        only=["cnv", "rppa"],
        progress=lambda rows, whole: progress_calls.append((rows, whole)),
    )
    assert progress_calls == [(90, 150), (150, 150)]


@pytest.mark.parametrize("name", ["manifest.json", "mirna/part-00000.parquet", "mirna/new.parquet"])
def test_nothing_is_written_into_a_store(done: Path, tmp_path: Path, capsys: Captured, name: str) -> None:
    shutil.copytree(done / "store", tmp_path / "store")
    before = {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()}
    arguments = [str(done / "run"), str(tmp_path / "store"), "--out", str(tmp_path / "store" / name)]
    assert command(["predict", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()} == before


def test_a_missing_parent_folder_is_a_one_line_error(done: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "nowhere" / "p.parquet"
    assert command(["predict", str(done / "run"), str(done / "store"), "--out", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(out.parent) in stderr and ".tmp" not in stderr


def test_a_store_without_the_models_modalities_is_refused(done: Path, tmp_path: Path, capsys: Captured) -> None:
    with StoreWriter(tmp_path / "foreign", source={"kind": "toy"}) as writer:
        for modality in ("mrna", "meth"):
            writer.begin(modality, ("g1", "g2"))
            writer.write(
                modality,
                sample_id=["s1", "s2"],
                group_id=["s1", "s2"],
                label=["a", "b"],
                split=["", ""],
                x=np.ones((2, 2), np.float32),
            )
    out = tmp_path / "p.parquet"
    assert command(["predict", str(done / "run"), str(tmp_path / "foreign"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "foreign") in error and "modalities" in error and not out.exists()


# --- out of memory ------------------------------------------------------------------------------------------


def test_out_of_memory_is_a_one_line_error_that_names_the_batch_size(done: Path, tmp_path: Path) -> None:
    output = tmp_path / "stderr"
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        sys.stderr = output.open("w", buffering=1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        huge = ["--set", "model.discriminator=[30000, 30000]"]  # 3.6 GB of weights
        os._exit(command(["train", str(done / "run.yaml"), "--out", str(tmp_path / "out"), *huge]))
    _, status = os.waitpid(child, 0)
    lines = output.read_text().splitlines()
    assert os.waitstatus_to_exitcode(status) == 3 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "optim.batch_size 8;" in lines[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("host"), "optim.batch_size 8"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "optim.batch_size 8"),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), "optim.batch_size 8"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "optim.batch_size 8"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore"), "uncorrectable ECC error encountered)"),
    ],
)
def test_an_out_of_memory_error_and_a_failed_gpu_are_one_line(
    done: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    error: Exception,
    message: str,
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run_pack, "fit", fit)
    assert command(["train", str(done / "run.yaml"), "--out", str(tmp_path / "out")]) == 3
    output = capsys.readouterr().err
    assert message in output and output.startswith("error: ") and output.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; free disk space,"),
        (OSError(errno.ENOENT, "No such file or directory", "x"), "x: No such file or directory; restore the file"),
        (OSError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; restore the permissions,"),
        (OSError("Arrow failed"), "folder: Arrow failed; free disk space or repair the disk,"),
    ],
)
def test_errors_of_a_file_system_get_advice(error: OSError, advice: str) -> None:
    with pytest.raises(DiskFailed) as raised, disk_errors(Path("folder")):
        raise error
    assert str(raised.value).startswith(advice)


@pytest.mark.parametrize("error", [ProcessLookupError(errno.ESRCH, "x"), ConnectionResetError(), TimeoutError("x")])
def test_other_errors_of_the_system_stay_what_they_are(error: OSError) -> None:
    with pytest.raises(type(error)), disk_errors(Path("folder")):
        raise error
