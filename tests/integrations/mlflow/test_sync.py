"""MLflow has exactly the content of the run folder, wherever an earlier call was interrupted."""

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.integrations.mlflow.sync import sync, was_delivered
from modis_dist.runtime.errors import ConfigError, DataError
from modis_dist.runtime.files import sha256
from modis_dist.train.journal import JournalWriter
from tests.integrations.mlflow.mlflow_tables import (
    content,
    curves,
    every_row,
    parent_and_trials,
    query,
    runs,
)
from tests.integrations.mlflow.replay import STUDY_ID, Replay, driver
from tests.integrations.mlflow.stub_model import stub_load, write_run  # noqa: F401

READY = 2  # in MLflow's table of models


# --- what is sent -----------------------------------------------------------------------------------------------


def test_a_finished_study_has_a_parent_nested_runs_curves_final_values_figures_checkpoints_and_a_model(
    replay: Replay,
) -> None:
    replay.finish()
    result = sync(replay.folder)
    parent, trials = parent_and_trials(replay.database)
    assert (result.trials, result.running, result.complete, result.problems) == (3, False, True, ())
    assert result.run_id == parent.id and was_delivered(replay.folder, replay.uri)
    replay.assert_complete()
    assert {run.status for run in (parent, *trials.values())} == {"FINISHED"}
    (refit,) = replay.refits
    summary = json.loads((replay.folder / "summary.json").read_text())
    metrics = dict(query(replay.database, "select key, value from latest_metrics where run_uuid = ?", trials[refit].id))
    mean = summary["test"]["balanced_accuracy"]["mean"]
    assert metrics["final/balanced_accuracy"] == mean
    sent = dict(query(replay.database, "select key, value from latest_metrics where run_uuid = ?", parent.id))
    assert sent["test/balanced_accuracy"] == mean
    params = dict(query(replay.database, "select key, value from params where run_uuid = ?", trials[refit].id))
    assert params["optim.lr"] == "0.001"
    assert [trials[name].tags["stage"] for name in [*replay.search, refit]] == ["search", "search", "refit"]
    assert trials[refit].name.startswith("refit ")
    for run in trials.values():
        checkpoint = Path(run.tags["modis.checkpoint"])
        assert run.tags["modis.checkpoint_sha256"] == sha256(checkpoint / "model.safetensors")
    stored = {path.name for path in (replay.folder / "mlflow-artifacts" / trials[refit].id).glob("artifacts/figures/*")}
    assert stored == {path.name for path in replay.source.glob(f"trials/{refit}/figures/*.png")} != set()
    assert query(replay.database, "select status from logged_models") == [(READY,)]


def test_a_finished_study_is_loaded_from_mlflow_as_a_model_with_a_signature(replay: Replay) -> None:
    from mlflow.models import Model

    replay.finish()
    sync(replay.folder)
    ((location,),) = query(replay.database, "select artifact_location from logged_models")
    signature = Model.load(location.removeprefix("file://")).signature
    assert "sample_id" in signature.inputs.input_names() and signature.params.params[0].name == "modality"


@pytest.mark.parametrize("stage", ["running", "interrupted", "finished"])
def test_a_second_call_changes_nothing(stage: str, replay: Replay) -> None:
    replay.epochs(3)
    replay.results(replay.search[:1])
    if stage == "finished":
        replay.finish()
    sync(replay.folder)
    with driver(replay.folder) if stage == "running" else threading.Lock():
        sync(replay.folder)
        before = every_row(replay.database)
        assert sync(replay.folder).metrics == 0
        assert every_row(replay.database) == before
    assert {"running": "RUNNING", "interrupted": "KILLED", "finished": "FINISHED"}[stage] == parent_and_trials(
        replay.database
    )[0].status


def test_no_run_is_created_for_a_trial_that_has_not_started(replay: Replay) -> None:
    with driver(replay.folder):
        assert sync(replay.folder).running
        replay.epochs(2, replay.search[:1])
        assert sync(replay.folder).trials == 1
    assert list(parent_and_trials(replay.database)[1]) == replay.search[:1]


def statuses(replay: Replay) -> list[str]:
    """Return the statuses of the parent and of the search trials in MLflow."""
    parent, trials = parent_and_trials(replay.database)
    return [run.status for run in (parent, *(trials[name] for name in replay.search))]


def test_a_running_study_is_running_and_one_whose_driver_was_killed_is_not(replay: Replay) -> None:
    with driver(replay.folder) as process:
        replay.epochs(3)
        replay.results(replay.search[:1])
        sync(replay.folder)
        assert statuses(replay) == ["RUNNING", "FINISHED", "RUNNING"]
        process.kill()
        process.wait()
        sync(replay.folder)
        assert statuses(replay) == ["KILLED", "FINISHED", "KILLED"]
    replay.finish()
    sync(replay.folder)
    assert {run.status for run in runs(replay.database)} == {"FINISHED"}
    replay.assert_complete()


def test_a_trial_without_result_is_failed_if_the_summary_lists_its_failure(replay: Replay) -> None:
    replay.finish()
    crashed, path = replay.search[0], replay.folder / "summary.json"
    (replay.folder / "trials" / crashed / "result.json").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"failures": {crashed: "out of memory"}}))
    sync(replay.folder)
    parent, trials = parent_and_trials(replay.database)
    assert trials.pop(crashed).status == "FAILED"
    assert {run.status for run in (parent, *trials.values())} == {"FINISHED"}


def test_a_pruned_trial_that_is_trained_further_is_running_again_and_has_every_epoch_once(replay: Replay) -> None:
    replay.epochs(3)
    name = replay.search[0]
    replay.results([name])
    path = replay.folder / "trials" / name / "result.json"
    finished = path.read_text()
    path.write_text(json.dumps(json.loads(finished) | {"status": "pruned", "evaluation": None, "baseline": None}))
    sync(replay.folder)
    assert parent_and_trials(replay.database)[1][name].status == "KILLED"
    path.unlink()
    with driver(replay.folder):
        with JournalWriter(replay.journal(name)) as journal:
            journal.metrics(name, step=100, values={"train/total_g": 1.0})
        sync(replay.folder)
        assert parent_and_trials(replay.database)[1][name].status == "RUNNING"
    path.write_text(finished)
    sync(replay.folder)
    assert parent_and_trials(replay.database)[1][name].status == "FINISHED"
    replay.assert_complete()


def test_a_trial_that_moved_to_a_pack_of_its_own_has_every_epoch_once(replay: Replay) -> None:
    from modis_dist.execution.trial import sequence_digest

    replay.epochs(3)
    name, other = replay.search
    with driver(replay.folder):
        sync(replay.folder)
        path = replay.folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"packs": [[name], [other]]}))
        own_pack = replay.folder / "packs" / sequence_digest([name])
        own_pack.mkdir()
        with JournalWriter(own_pack / "journal.jsonl") as journal:
            for step in range(1, 6):
                journal.metrics(name, step=step, values={"val/balanced_accuracy": 0.5})
        sync(replay.folder)
    points = curves(replay.database, parent_and_trials(replay.database)[1][name].id)
    assert len({(key, step) for key, step, *_ in points}) == len(points) and {step for _, step, *_ in points} == {
        *range(1, 6)
    }


@pytest.mark.filterwarnings("ignore:.*")
def test_unusual_names_and_values_are_sent_and_so_is_the_rest_of_a_refused_batch(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = replay.search[0]
    replay.epochs(2)
    odd = {"loss": math.nan, "up": math.inf, "recall[Luminal A]": 0.5, "recall(Luminal A)": 0.25, "//": 1.0, "é": 2.0}
    with JournalWriter(replay.journal(name)) as writer:
        writer.metrics(name, step=3, values=odd)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: -5_000_000)
            writer.metrics(name, step=4, values={"a": 1.0})
        writer.metrics(name, step=5, values={"a": 2.0})
    replay.results([])
    (problem,) = sync(replay.folder).problems
    assert "epoch 4" in problem
    _, trials = parent_and_trials(replay.database)
    recorded = {(key, step): value for key, step, _, value in curves(replay.database, trials[name].id)}
    assert (
        ("a", 4) not in recorded and recorded["a", 5] == 2.0 and recorded["up", 3] > 1e308 and recorded["é", 3] == 2.0
    )
    assert sorted(v for (key, _), v in recorded.items() if key.startswith("recall_Luminal A_-")) == [0.25, 0.5]
    assert ("loss", 3) in recorded and "modis.delivered" not in trials[name].tags


def test_files_that_cannot_be_stored_are_named_and_the_run_is_closed(replay: Replay) -> None:
    replay.finish()
    figures = replay.folder / "trials" / replay.search[0] / "figures"
    figures.mkdir()
    (figures / "gone.png").symlink_to("nowhere.png")
    result = sync(replay.folder)
    assert not result.complete and "gone.png" in result.problems[0]
    parent, trials = parent_and_trials(replay.database)
    run = trials[replay.search[0]]
    assert run.status == parent.status == "FINISHED" and "gone.png" in run.tags["modis.not_uploaded"]
    assert "modis.delivered" not in run.tags and not was_delivered(replay.folder, replay.uri)
    (figures / "gone.png").unlink()
    assert sync(replay.folder).complete and was_delivered(replay.folder, replay.uri)


def test_names_that_mlflow_accepts_are_kept_and_others_stay_unique() -> None:
    from mlflow.utils.validation import _validate_metric_name

    odd = ["a", "a/b", "a b-c.d_e", "a//b", "/a", "../a", "a:b", "a;b", "", ".", "x" * 400, "x" * 401, "a\nb", "\ud800"]
    clean = [mlflow_text.key(name) for name in odd]
    for name in clean:
        _validate_metric_name(name)
    assert clean[:3] == odd[:3] and len(set(clean)) == len(odd) and max(map(len, clean)) <= 250
    assert len(mlflow_text.value("x" * 5000)) <= 500 and "... sha256:" in mlflow_text.value("x" * 5000)


# --- crashes ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    """Simulated death of the process or the server."""


def breaking(number: int, *, after: bool) -> Callable[[pytest.MonkeyPatch], list[int]]:
    """Make request ``number`` fail, before or after MLflow has handled it; return the request count."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
        from mlflow import MlflowClient

        requests = [0]
        methods = ["create_run", "log_batch", "set_tag", "set_terminated", "update_run", "log_artifact", "log_outputs"]
        methods += ["create_logged_model", "log_model_artifacts", "finalize_logged_model", "create_experiment"]
        for name in methods:
            genuine = getattr(MlflowClient, name)

            def counted(*values: Any, genuine: Any = genuine, **named: Any) -> Any:
                requests[0] += 1
                broken = requests[0] == number
                if broken and not after:
                    raise Broken
                answer = genuine(*values, **named)
                if broken:
                    raise Broken
                return answer

            monkeypatch.setattr(MlflowClient, name, counted)
        return requests

    return patch


@pytest.mark.slow
@pytest.mark.usefixtures("stub_load")
@pytest.mark.parametrize("after", [False, True], ids=["before it is done", "after it is done"])
def test_after_a_failure_of_any_request_the_next_call_completes_the_study(
    after: bool, finished: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study(name: str) -> Replay:
        replay = Replay(finished, tmp_path / name, database=empty_database)
        replay.finish()
        shutil.rmtree(replay.folder / "model")
        write_run(replay.folder / "model")
        return replay

    uninterrupted = study("uninterrupted")
    with monkeypatch.context() as patch:
        requests = breaking(-1, after=after)(patch)
        sync(uninterrupted.folder)
    assert requests[0] > 40
    for number in range(1 + after, requests[0] + 1, 2):  # each parameter value tests half of the requests
        broken = study(f"broken {number}")
        with monkeypatch.context() as patch, pytest.raises(Broken):
            breaking(number, after=after)(patch)
            sync(broken.folder)
        assert sync(broken.folder).complete
        assert content(broken.database, broken.folder) == content(uninterrupted.database, uninterrupted.folder), number
        shutil.rmtree(broken.folder)


def test_a_partially_sent_epoch_is_completed(replay: Replay) -> None:
    replay.epochs(4)
    sync(replay.folder)
    _, trials = parent_and_trials(replay.database)
    import sqlite3

    with sqlite3.connect(replay.database) as database:  # as left by a server that stores values one by one
        for table in ("metrics", "latest_metrics"):
            database.execute(f"delete from {table} where step = 4 and key > 'train/l'")
        database.execute("delete from metrics where step = 2 and key like 'val/%'")
    database.close()
    sync(replay.folder)
    replay.assert_complete()
    assert parent_and_trials(replay.database)[1].keys() == trials.keys()


def test_a_run_that_was_deleted_is_replaced_by_a_complete_one(replay: Replay) -> None:
    replay.epochs(4)
    sync(replay.folder)
    _, trials = parent_and_trials(replay.database)
    mlflow_store.connect(replay.uri).delete_run(trials[replay.search[0]].id)
    replay.finish()
    sync(replay.folder)
    replay.assert_complete()


def test_a_deleted_experiment_is_refused_with_advice(replay: Replay) -> None:
    result = sync(replay.folder)
    mlflow_store.connect(replay.uri).delete_experiment(result.experiment_id)
    with pytest.raises(ConfigError, match=r"sweep\.mlflow\.experiment"):
        sync(replay.folder)


def test_a_copied_or_moved_run_folder_is_not_sent_a_second_time(replay: Replay) -> None:
    replay.finish()
    sync(replay.folder)
    moved = replay.folder.rename(replay.folder.with_name("moved"))
    assert sync(moved).complete
    assert len(runs(moved / "mlflow.db")) == 4


def test_runs_of_another_folder_whose_driver_died_are_closed(replay: Replay, finished: Path, tmp_path: Path) -> None:
    other = Replay(finished, tmp_path / "other")
    (other.folder / mlflow_store.DATABASE).unlink(missing_ok=True)
    other.epochs(2)
    (other.folder / "mlflow-sync.json").write_text(json.dumps({"study_id": "other"}))
    with driver(other.folder) as process:
        sync(other.folder, replay.uri)
        assert sync(replay.folder).trials == 0
        states = {run.tags["modis.study_id"]: run.status for run in runs(replay.database)}
        assert states == {"other": "RUNNING", STUDY_ID: "KILLED"}
        process.kill()
        process.wait()
        sync(replay.folder)
    assert {run.status for run in runs(replay.database)} == {"KILLED"}


def test_a_damaged_state_file_is_refused_and_nothing_is_sent_a_second_time(replay: Replay) -> None:
    replay.finish()
    sync(replay.folder)
    before = every_row(replay.database)
    (replay.folder / "mlflow-sync.json").write_text("{")
    with pytest.raises(DataError, match=r"mlflow-sync\.json"):
        sync(replay.folder)
    assert every_row(replay.database) == before


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        sync(tmp_path)


# --- one writer -------------------------------------------------------------------------------------------------


def test_a_second_process_that_sends_the_same_folder_is_refused(replay: Replay) -> None:
    with mlflow_store.only_writer(replay.folder), pytest.raises(mlflow_store.Busy):
        sync(replay.folder)


def _connect(uri: str, barrier: Any) -> None:
    from mlflow import MlflowClient  # noqa: F401  # imported first, so that both open the database at the same time

    barrier.wait(60)
    mlflow_store.connect(uri)


@pytest.mark.slow
def test_two_processes_may_create_the_database_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    uri = mlflow_store.default_uri(tmp_path)
    processes = [context.Process(target=_connect, args=(uri, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert mlflow_store.connect(uri).create_experiment("after")


def test_a_kill_while_mlflow_creates_its_tables_does_not_block_the_next_process(tmp_path: Path) -> None:
    code = "import sys; from modis_dist.integrations.mlflow.store import connect; connect(sys.argv[1])"
    uri, database = mlflow_store.default_uri(tmp_path), tmp_path / mlflow_store.DATABASE
    with subprocess.Popen([sys.executable, "-c", code, uri]) as process:
        while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.new-*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9 and not database.exists()
    client = mlflow_store.connect(uri)
    assert client.create_experiment("after") and database.stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "file:///tmp/mlruns",
        "/tmp/mlruns",
        "sqlite:///relative.db",
        "sqlite:////no/such/folder/mlflow.db",
        "sqlite:////tmp/what?/mlflow.db",
        "redis://u:secret@h",
    ],
)
def test_an_invalid_tracking_uri_is_refused_before_anything_is_sent(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.mlflow\.tracking_uri") as caught:
        mlflow_store.checked(uri)
    assert "secret" not in str(caught.value) and ";" in str(caught.value)  # the problem; the fix


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    spaced = tmp_path / "with space"
    spaced.mkdir()
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {str(spaced).replace(' ', chr(92) + '040')} nfs4 rw 0 0\n")
    assert mlflow_store.file_system(spaced / "deep", mounts=mounts) == "nfs4"
    assert mlflow_store.file_system(tmp_path, mounts=mounts) == "ext4"
    assert mlflow_store.file_system(tmp_path, mounts=tmp_path / "none") == ""
    monkeypatch.setattr(mlflow_store, "file_system", lambda _path: "nfs4")
    with pytest.raises(ConfigError, match=r"\(nfs4\)"):
        mlflow_store.checked(mlflow_store.default_uri(tmp_path))


def test_without_mlflow_a_tracking_uri_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install mlflow"):
        mlflow_store.checked(mlflow_store.default_uri(tmp_path))


def test_a_file_that_is_not_a_database_is_refused_unchanged(replay: Replay) -> None:
    replay.database.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(ConfigError, match=r"mlflow\.db"):
        sync(replay.folder)
    assert replay.database.read_bytes().startswith(b"this is not")


def test_mlflow_loads_no_pickled_model(replay: Replay) -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    sync(replay.folder)
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False
