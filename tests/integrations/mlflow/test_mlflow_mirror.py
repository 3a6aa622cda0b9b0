"""What MLflow holds is exactly what the journals hold, whatever was killed, deleted, locked or down in between."""

import inspect
import json
import math
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from modis_dist.integrations.mlflow import mirror as mlflow_mirror
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.integrations.mlflow.mirror import BackgroundMirror, Mirror, NotUploaded, NullMirror
from modis_dist.runtime.errors import ConfigError
from modis_dist.train.journal import JournalWriter, read
from tests.integrations.mlflow import mlflow_tables
from tests.integrations.mlflow.mlflow_tables import expected
from tests.integrations.mlflow.stub_model import stub_load, write_run  # noqa: F401

NUMBERS = count()
MAKE_TABLES = mlflow_store._make_tables  # where studies of tests get copies of tables made once


def _start_at_once(folder: str, barrier: Any) -> None:
    from mlflow import MlflowClient  # noqa: F401  # imported first, so that both reach the database together

    barrier.wait(60)
    opened(Path(folder), "same")


@pytest.fixture(scope="module")
def made_at_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int | None]]:
    """One output folder with one database for all tests (a new one costs seconds), made by two processes at once."""
    folder = tmp_path_factory.mktemp("study out")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=_start_at_once, args=(str(folder), barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return folder, [process.exitcode for process in both]


@pytest.fixture(scope="module")
def folder(made_at_once: tuple[Path, list[int | None]]) -> Path:
    return made_at_once[0]


@pytest.fixture
def study() -> str:
    return f"{next(NUMBERS):08x}study"


def opened(folder: Path, study: str, uri: str | None = None) -> Mirror:
    mirror = Mirror(uri=uri or mlflow_store.default_uri(folder), experiment="tcga", study=study, folder=folder)
    mirror.start(params={"seed": 0}, tags={"kind": "test"})
    return mirror


def records(tmp_path: Path, *steps: int, trial: str = "t1", names: int = 3) -> list[dict[str, Any]]:
    path = tmp_path / f"{trial}.jsonl"
    writer = JournalWriter(path)
    for step in steps:
        writer.metrics(trial, step=step, values={f"loss/{name}": math.sin(step + name) for name in range(names)})
    writer.close()
    return read(path)


def run_of(mirror: Mirror, trial: str) -> Any:
    runs = mirror._runs.search(f"tags.`modis.trial_id` = '{trial}' and tags.`modis.study_id` = '{mirror._study}'")
    return runs[0]


def curves(mirror: Mirror, trial: str) -> mlflow_tables.Points:
    """Everything MLflow has of a trial."""
    path = mlflow_store.sqlite_path(mirror.uri)
    assert path is not None
    return mlflow_tables.curves(path, run_of(mirror, trial).info.run_id)


# --- what is recorded -------------------------------------------------------------------------------------------


def test_the_database_and_the_artifacts_are_private_and_inside_the_folder(folder: Path, study: str) -> None:
    mirror = opened(folder, study)
    experiment = mirror._runs.client.get_experiment(mirror.describe()["experiment_id"])
    assert experiment.artifact_location == (folder / "mlflow-artifacts").as_uri()
    assert [p.name for p in folder.iterdir() if p.stat().st_mode & 0o077] == []
    assert (folder / "mlflow.db").is_file()


def test_a_driver_killed_while_mlflow_makes_its_tables_leaves_nothing_that_stops_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "_make_tables", MAKE_TABLES)
    code = "import sys; from modis_dist.integrations.mlflow.store import connect; connect(sys.argv[1])"
    uri, database = mlflow_store.default_uri(tmp_path), tmp_path / mlflow_store.DATABASE
    with subprocess.Popen([sys.executable, "-c", code, uri]) as driver:
        while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.new-*")):
            assert driver.poll() is None
            time.sleep(0.005)
        driver.kill()
    assert driver.returncode == -9 and not database.exists()
    client = mlflow_store.connect(uri)
    assert client.create_experiment("after") and database.stat().st_mode & 0o077 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_trial_is_nested_under_its_study_with_curves_final_values_and_files(
    folder: Path, study: str, tmp_path: Path
) -> None:
    mirror, journal = opened(folder, study), records(tmp_path, *range(5))
    figure = tmp_path / "curves.png"
    figure.write_bytes(b"png")
    mirror.trial("t1", name="beta 1e-4", params={"objective": {"beta": 1e-4}, "seed": 3}, tags={"fold": "0"})
    mirror.feed([*journal, {"kind": "end", "trial": "t1", "time_ms": 1, "values": {}}])
    mirror.end_trial("t1", status="FINISHED", metrics={"balanced_accuracy": 0.9}, artifacts=[figure])
    run = run_of(mirror, "t1")
    assert run.data.tags["mlflow.parentRunId"] == mirror.describe()["parent_run_id"]
    assert (run.info.run_name, run.info.status) == ("beta 1e-4", "FINISHED")
    assert run.data.params == {"objective.beta": "0.0001", "seed": "3"}
    assert run.data.metrics["final/balanced_accuracy"] == 0.9
    assert "| balanced\\_accuracy | 0.9 |" in run.data.tags["mlflow.note.content"]
    assert [f.path for f in mirror._runs.client.list_artifacts(run.info.run_id, "figures")] == ["figures/curves.png"]
    assert curves(mirror, "t1") == expected(journal)


def test_nothing_is_made_for_a_trial_that_never_ran(folder: Path, study: str) -> None:
    mirror = opened(folder, study)
    mirror.trial("t1", name="never", params={}, tags={})
    mirror.feed([])
    assert mirror._runs.search(f"tags.`modis.study_id` = '{study}' and tags.`modis.trial_id` = 't1'") == []


@pytest.mark.usefixtures("stub_load")
def test_the_parent_ends_with_a_result_table_and_a_model_that_is_stored_once(
    folder: Path, study: str, tmp_path: Path
) -> None:
    best = write_run(tmp_path / "run")
    for _start in range(2):
        mirror = opened(folder, study)
        for k in range(2):
            mirror.trial(f"t{k}", name=f"lr|{k}", params={"lr": k, "same": 1}, tags={})
            mirror.end_trial(f"t{k}", status="FINISHED", metrics={"acc": k / 2}, artifacts=[])
        mirror.finish(status="FINISHED", metrics={"test/acc": 0.75}, artifacts=[], model=best)
    client, ids = mirror._runs.client, mirror.describe()
    parent = client.get_run(ids["parent_run_id"])
    note = parent.data.tags["mlflow.note.content"]
    assert "**2 of 2 trials finished.**" in note and "| test/acc | 0.75 |" in note
    assert "| lr\\|1 | finished | 0.5 |" in note
    models = [m for m in client.search_logged_models([ids["experiment_id"]]) if m.source_run_id == ids["parent_run_id"]]
    assert [str(model.status) for model in models] == ["READY"]
    assert {metric.key: metric.value for metric in models[0].metrics} == {"test/acc": 0.75}
    assert (Path(models[0].artifact_location.removeprefix("file://").replace("%20", " ")) / "MLmodel").is_file()


def test_long_many_and_oddly_named_values_are_taken(folder: Path, study: str) -> None:
    mirror = opened(folder, study)
    params = {f"p{k}": k for k in range(250)} | {"long": "x" * 5000, "bad [name]": "y", "../up": 1, "list": [1, "a"]}
    mirror.trial("t1", name="n" * 600, params=params, tags={"odd {tag}": "z" * 9000})
    odd = {"loss": math.nan, "up": math.inf, "recall[Luminal A]": 0.5, "recall(Luminal A)": 0.25, "//": 1.0, "é": 2.0}
    mirror.feed([{"kind": "metrics", "trial": "t1", "time_ms": 5, "step": 0, "values": odd}])
    data = run_of(mirror, "t1").data
    assert len(data.params) == 254
    assert len(data.params["long"]) <= 500 and "... sha256:" in data.params["long"]
    assert math.isnan(data.metrics["loss"]) and data.metrics["up"] > 1e308
    assert sorted(v for n, v in data.metrics.items() if n.startswith("recall_Luminal A_-")) == [0.25, 0.5]
    assert data.metrics["é"] == 2.0


def test_names_that_mlflow_takes_are_kept_and_others_stay_apart() -> None:
    from mlflow.utils.validation import _validate_metric_name

    odd = ["a", "a/b", "a b-c.d_e", "a//b", "/a", "../a", "a:b", "a;b", "", ".", "x" * 400, "x" * 401, "a\nb", "\ud800"]
    clean = [mlflow_text.key(name) for name in odd]
    for name in clean:
        _validate_metric_name(name)
    assert clean[:3] == odd[:3] and len(set(clean)) == len(odd) and max(map(len, clean)) <= 250


# --- restarts ---------------------------------------------------------------------------------------------------


def test_feeding_twice_and_after_a_restart_gives_every_epoch_once(folder: Path, study: str, tmp_path: Path) -> None:
    journal = records(tmp_path, *range(40), names=30)  # more than one request
    first = opened(folder, study)
    first.trial("t1", name="a", params={"lr": 1}, tags={})
    first.feed(journal[:10])
    first.feed(journal[5:20])
    half = [dict(journal[20], values=dict(list(journal[20]["values"].items())[:7]))]
    first.feed(half)  # killed in the middle of an epoch
    second = opened(folder, study)
    second.trial("t1", name="a", params={"lr": 1, "new": 2}, tags={})
    second.feed(journal)
    assert curves(second, "t1") == expected(journal)
    assert second.describe() == first.describe()
    assert run_of(second, "t1").data.params == {"lr": "1", "new": "2"}


def test_runs_that_a_killed_driver_left_open_are_ended_unless_they_go_on(
    folder: Path, study: str, tmp_path: Path
) -> None:
    first = opened(folder, study)
    for trial in ("goes", "stays"):
        first.feed(records(tmp_path, 0, trial=trial))
    second = opened(folder, study)
    assert {run_of(second, t).info.status for t in ("goes", "stays")} == {"KILLED"}
    assert second._runs.get(second.describe()["parent_run_id"]).info.status == "RUNNING"
    second.feed(records(tmp_path, 0, 1, trial="goes"))
    assert (run_of(second, "goes").info.status, run_of(second, "stays").info.status) == ("RUNNING", "KILLED")
    second.finish(status="KILLED", metrics={}, artifacts=[], model=None)
    assert run_of(second, "goes").info.status == "KILLED"


def test_a_delivered_trial_is_not_sent_again_and_a_failed_one_goes_on(
    folder: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed = records(tmp_path, 0, 1, trial="done"), records(tmp_path, 0, trial="failed")
    first = opened(folder, study)
    for trial, journal, status in (("done", done, "FINISHED"), ("failed", failed, "FAILED")):
        first.feed(journal)
        first.end_trial(trial, status=status, metrics={}, artifacts=[])
    second, sent = opened(folder, study), []
    monkeypatch.setattr(second._runs.client, "log_batch", lambda run_id, **_: sent.append(run_id))
    second.feed(done)
    second.end_trial("done", status="FINISHED", metrics={"a": 1.0}, artifacts=[])
    assert sent == []
    monkeypatch.undo()
    second.feed(records(tmp_path, 1, trial="failed"))
    second.end_trial("failed", status="FINISHED", metrics={}, artifacts=[])
    assert run_of(second, "failed").info.status == "FINISHED"
    assert {row[1] for row in curves(second, "failed")} == {0, 1}


@pytest.mark.parametrize(("method", "late"), [("create_run", True), ("log_batch", False)])
def test_a_run_whose_making_failed_half_way_is_made_once_and_gets_its_parameters(
    method: str, late: bool, folder: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = opened(folder, study)
    mirror.trial("t1", name="t1", params={"lr": 0.5}, tags={})
    genuine = getattr(mirror._runs.client, method)

    def broken(*given: Any, **named: Any) -> None:
        if late:
            genuine(*given, **named)
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(mirror._runs.client, method, broken)
        mirror.feed(records(tmp_path, 0))
    mirror.feed(records(tmp_path, 0))
    (run,) = mirror._runs.search(f"tags.`modis.study_id` = '{study}' and tags.`modis.trial_id` = 't1'")
    assert run.data.params == {"lr": "0.5"} and curves(mirror, "t1") == expected(records(tmp_path, 0))


def test_a_run_deleted_by_someone_is_replaced_by_one_that_names_it_and_is_whole_after_a_restart(
    folder: Path, study: str, tmp_path: Path
) -> None:
    journal = records(tmp_path, *range(6))
    mirror = opened(folder, study)
    mirror.feed(journal[:3])
    deleted = run_of(mirror, "t1").info.run_id
    mirror._runs.client.delete_run(deleted)
    mirror.feed(journal[3:])
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    assert run_of(mirror, "t1").data.tags["modis.replaces"] == deleted
    again = opened(folder, study)
    again.feed(journal)
    assert curves(again, "t1") == expected(journal)


def test_files_that_cannot_be_stored_are_named_and_the_run_is_closed(folder: Path, study: str, tmp_path: Path) -> None:
    mirror = opened(folder, study)
    with pytest.raises(NotUploaded, match=r"gone\.png"):
        mirror.end_trial("t1", status="FINISHED", metrics={"a": 1.0}, artifacts=[tmp_path / "gone.png"])
    run = run_of(mirror, "t1")
    assert run.info.status == "FINISHED" and run.data.metrics["final/a"] == 1.0
    assert "gone.png" in run.data.tags["modis.not_uploaded"] and "modis.delivered" not in run.data.tags


def test_two_processes_may_make_the_database_at_once(made_at_once: tuple[Path, list[int | None]]) -> None:
    assert made_at_once[1] == [0, 0]


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("file:///tmp/mlruns", "no longer takes folders"),
        ("/tmp/mlruns", "no longer takes folders"),
        ("sqlite:///relative.db", "absolute path"),
        ("sqlite:////no/such/folder/mlflow.db", "create it"),
        ("sqlite:////tmp/what?/mlflow.db", "cannot hold"),
        ("redis://u:secret@h", "unknown kind of address"),
    ],
)
def test_an_address_that_cannot_work_is_refused_with_advice(uri: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=advice) as caught:
        Mirror(uri=uri, experiment="e", study="s", folder=tmp_path)
    assert "secret" not in str(caught.value)


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "file_system", lambda _path: "nfs4")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\).*local disk"):
        Mirror(uri=mlflow_store.default_uri(tmp_path), experiment="e", study="s", folder=tmp_path)


def test_without_mlflow_the_address_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="not installed"):
        Mirror(uri=mlflow_store.default_uri(tmp_path), experiment="e", study="s", folder=tmp_path)


def test_a_deleted_experiment_is_refused_with_advice(folder: Path) -> None:
    mirror = Mirror(uri=mlflow_store.default_uri(folder), experiment="gone", study="s", folder=folder)
    mirror.start(params={}, tags={})
    mirror._runs.client.delete_experiment(mirror.describe()["experiment_id"])
    with pytest.raises(ConfigError, match="was deleted"):
        mirror.start(params={}, tags={})


# --- in the background ------------------------------------------------------------------------------------------


class _Broken(BaseHTTPRequestHandler):
    """An MLflow server that answers 500, or never."""

    def do_GET(self) -> None:
        if self.server.hang.wait(0 if self.server.answers else 20):  # type: ignore[attr-defined]
            return
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["refused", "500", "hangs"])
def broken_uri(request: pytest.FixtureRequest) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Broken)
    server.answers, server.hang = request.param == "500", threading.Event()  # type: ignore[attr-defined]
    if request.param == "refused":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://user:SECRET@127.0.0.1:{server.server_port}"
    server.hang.set()  # type: ignore[attr-defined]
    if request.param != "refused":
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_mirror, "FIRST_PAUSE_S", 0.05)


def drive(mirror: BackgroundMirror, journal: list[dict[str, Any]]) -> list[float]:
    """The calls of a driver; seconds that each took."""
    took = []

    def timed(call: Any, *args: Any, **values: Any) -> None:
        began = time.perf_counter()
        call(*args, **values)
        took.append(time.perf_counter() - began)

    timed(mirror.start, params={}, tags={})
    timed(mirror.trial, "t1", name="a", params={}, tags={})
    for record in journal:
        timed(mirror.feed, [record])
    timed(mirror.end_trial, "t1", status="FINISHED", metrics={}, artifacts=[])
    timed(mirror.finish, status="FINISHED", metrics={}, artifacts=[], model=None)
    return took


def test_a_broken_server_never_holds_up_the_driver_and_is_reported_without_its_password(
    broken_uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = BackgroundMirror(Mirror(uri=broken_uri, experiment="e", study="s", folder=tmp_path))
    took = sorted(drive(mirror, records(tmp_path, *range(20))))
    assert took[len(took) // 2] < 0.01 and sum(took) < 1
    began = time.perf_counter()
    problems = mirror.close(0.6)
    assert time.perf_counter() - began < 2
    assert "updates not delivered" in problems[-1]
    shown = "\n".join(problems) + caplog.text + json.dumps(mirror.describe())
    assert "SECRET" not in shown and "user:***@127.0.0.1" in shown
    assert len([r for r in caplog.records if r.name == "modis_dist.integrations.mlflow.mirror"]) <= 1


def test_a_database_locked_for_a_while_delays_nobody_and_loses_nothing(
    folder: Path, study: str, tmp_path: Path
) -> None:
    opened(folder, study)
    journal = records(tmp_path, *range(20))
    lock = sqlite3.connect(folder / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    inner = Mirror(uri=mlflow_store.default_uri(folder), experiment="tcga", study=study, folder=folder)
    mirror = BackgroundMirror(inner)
    took = sorted(drive(mirror, journal))
    assert took[len(took) // 2] < 0.01 and sum(took) < 1
    assert "updates not delivered" in mirror.close(0.2)[-1]
    lock.execute("ROLLBACK")
    lock.close()
    mirror._thread.join(30)
    again = opened(folder, study)
    again.feed(journal)
    assert curves(again, "t1") == expected(journal)


def test_what_cannot_ever_be_taken_is_reported_and_the_rest_is_delivered(
    folder: Path, study: str, tmp_path: Path
) -> None:
    inner = Mirror(uri=mlflow_store.default_uri(folder), experiment="tcga", study=study, folder=folder)
    mirror = BackgroundMirror(inner)
    mirror.start(params={}, tags={})
    mirror.feed([{"kind": "metrics", "trial": "t1", "time_ms": -5, "step": 0, "values": {"a": 1.0}}])
    journal = records(tmp_path, 1, 2)
    mirror.feed(journal)
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[tmp_path / "gone.csv"])
    problems = mirror.close(30)
    assert len(problems) == 3 and "gone.csv" in problems[1]
    assert problems[2] == "not everything was taken; the same command tries the rest again"
    assert curves(inner, "t1") == expected(journal)
    assert "modis.delivered" not in run_of(inner, "t1").data.tags


def test_a_backlog_is_bounded_and_left_to_the_next_start(
    folder: Path, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "MAX_PENDING", 4)
    journal, go = records(tmp_path, *range(10)), threading.Event()
    inner = Mirror(uri=mlflow_store.default_uri(folder), experiment="tcga", study=study, folder=folder)
    start = inner.start
    monkeypatch.setattr(inner, "start", lambda **values: go.wait(20) and start(**values))
    mirror = BackgroundMirror(inner)
    mirror.start(params={}, tags={})
    for record in journal:
        mirror.feed([record])
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    go.set()
    assert "too slow" in mirror.close(30)[0]
    assert curves(inner, "t1") == expected(journal[:4])
    again = opened(folder, study)
    again.feed(journal)
    assert curves(again, "t1") == expected(journal)


def test_an_address_that_is_refused_late_stops_the_mirror_and_not_the_driver(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database at all" * 100)
    mirror = BackgroundMirror(
        Mirror(uri=mlflow_store.default_uri(tmp_path), experiment="e", study="s", folder=tmp_path)
    )
    drive(mirror, records(tmp_path, 0, 1))
    refused, left = mirror.close(20)
    assert "is not a SQLite database" in refused and "updates not delivered" in left
    assert (tmp_path / "mlflow.db").read_bytes().startswith(b"this is not")


def test_the_null_mirror_has_the_same_calls() -> None:
    for name in ("start", "trial", "feed", "end_trial", "finish", "describe", "close"):
        assert inspect.signature(getattr(NullMirror, name)) == inspect.signature(getattr(BackgroundMirror, name))
    null = NullMirror()
    assert null.feed([]) is None and null.describe() == {} and null.close(0) == []
    assert os.environ.get("MLFLOW_ALLOW_PICKLE_DESERIALIZATION") == "false"  # by the mirrors before
