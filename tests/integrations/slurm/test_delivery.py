"""MLflow of a submission: the tracking URI is checked before jobs are sent, and `fetch` sends what jobs could not."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from modis_dist.cli.main import run as command
from modis_dist.config import parse
from modis_dist.config.study import Study
from modis_dist.integrations.mlflow.sync import write_state
from modis_dist.integrations.slurm import fetch
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.test_capacity import submit
from tests.integrations.slurm.toy_submission import submitted

SERVER = "http://127.0.0.1:9"
UNUSABLE = ["--set", "sweep.mlflow.tracking_uri=ftp://nowhere"]


def tracked_at(uri: str, out: Path) -> None:
    """Set the tracking URI of the submitted study."""
    path = out / "submission" / "study.yaml"
    tree = parse.to_tree(parse.load_study(path))
    tree["sweep"]["mlflow"]["tracking_uri"] = uri
    path.write_text(parse.dump(parse.build(Study, tree, source="study")))


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["sent", "dry run"])
def test_an_invalid_tracking_uri_is_refused_before_jobs_are_sent(
    options: list[str], slurm: FakeSlurm, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, store, *options, *UNUSABLE) == 2
    error = capsys.readouterr().err
    assert "sweep.mlflow.tracking_uri" in error and "ftp://nowhere" in error
    assert not (tmp_path / "out").exists() and not slurm.jobs


def test_a_study_whose_tracking_uri_became_invalid_is_not_resumed(
    slurm: FakeSlurm, store: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store, out)
    slurm.end()
    tracked_at(f"sqlite:///{out}/gone/mlflow.db", out)
    assert command(["resume", str(out)]) == 2
    assert "gone" in capsys.readouterr().err and not slurm.jobs


@pytest.mark.usefixtures("slurm")
def test_fetch_fills_mlflow_from_the_journals_unless_a_server_has_all_of_the_study(
    store: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[Path] = []

    def sync(folder: Path, *_: object, **__: object) -> SimpleNamespace:
        filled.append(folder)
        return SimpleNamespace(problems=())

    monkeypatch.setattr(fetch, "sync", sync)

    def fills() -> bool:
        filled.clear()
        assert command(["fetch", str(out), "--to", str(tmp_path / "home")]) == 0
        return filled == [tmp_path / "home"]

    submitted(store, out)
    tracked_at(SERVER, out)
    assert fills(), "jobs may not have reached the server"
    manifest, summary = (out / "manifest.json").read_bytes(), b"{}"
    (out / "summary.json").write_bytes(summary)
    write_state(out, uri=SERVER, delivered=hashlib.sha256(manifest + summary).hexdigest()[:32])
    assert not fills()
    write_state(out, uri="http://127.0.0.1:10")
    assert fills()
    write_state(out, uri=SERVER)
    (out / "summary.json").write_bytes(b'{"seconds": 1}')
    assert fills(), "the server has an earlier summary"
    database = f"sqlite:///{out}/mlflow.db"
    tracked_at(database, out)
    (out / "summary.json").write_bytes(summary)
    write_state(out, uri=database)
    assert fills(), "the database is on another machine"
