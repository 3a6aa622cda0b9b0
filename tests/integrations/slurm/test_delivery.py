"""MLflow of a submission: its address is checked before jobs are sent, and `fetch` fills what jobs could not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modis_dist.cli import tune
from modis_dist.cli.main import run as command
from modis_dist.config import parse
from modis_dist.config.study import Study
from modis_dist.integrations.mlflow.mirror import NullMirror
from modis_dist.integrations.mlflow.store import note_delivery, was_delivered
from modis_dist.integrations.slurm import fetch
from modis_dist.study import run
from tests.integrations.slurm.fake_slurm import FakeSlurm
from tests.integrations.slurm.test_capacity import asked
from tests.integrations.slurm.toy_submission import study, submitted

SERVER = "http://127.0.0.1:9"
UNUSABLE = ["--set", "sweep.mlflow.tracking_uri=ftp://nowhere"]


def tracked_at(uri: str, out: Path) -> None:
    """Have the submitted study track at an address."""
    path = out / "submission" / "study.yaml"
    tree = parse.to_tree(parse.load_study(path))
    tree["sweep"]["mlflow"]["tracking_uri"] = uri
    path.write_text(parse.dump(parse.build(Study, tree, source="study")))


@pytest.mark.parametrize("how", [[], ["--dry-run"]], ids=["sent", "dry run"])
def test_an_address_that_mlflow_does_not_take_is_refused_before_anything_is_sent(
    how: list[str], slurm: FakeSlurm, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(tmp_path, store, *how, *UNUSABLE) == 2
    assert "sweep.mlflow.tracking_uri: unknown kind of address ftp://nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not slurm.jobs


def test_an_address_that_mlflow_does_not_take_any_more_keeps_a_study_from_being_resumed(
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
    monkeypatch.setattr(fetch, "_fill", lambda *_: ["filled"])

    def curves() -> list[str]:
        return fetch._curves(tmp_path, out, lambda *_: None)

    submitted(store, out)
    tracked_at(SERVER, out)
    assert curves() == ["filled"], "no job may have reached it"
    note_delivery(out, SERVER)
    assert curves() == []
    note_delivery(out, "http://127.0.0.1:10")
    assert curves() == ["filled"]
    note_delivery(out, None)
    assert curves() == ["filled"]
    database = f"sqlite:///{out}/mlflow.db"
    tracked_at(database, out)
    note_delivery(out, database)
    assert curves() == ["filled"], "it is on another machine"


@pytest.mark.parametrize("problems", [[], ["3 updates not delivered"]], ids=["all", "not all"])
def test_a_start_writes_down_whether_mlflow_has_all_of_the_study(
    problems: list[str], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mirror(NullMirror):
        def close(self, timeout_s: float) -> list[str]:  # noqa: ARG002
            return problems

    def run_study(*_: Any, **__: Any) -> dict[str, Any]:
        assert not was_delivered(tmp_path, SERVER), "of what is trained now it has nothing yet"
        return {}

    monkeypatch.setattr(tune, "_mirror", lambda *_: Mirror())
    monkeypatch.setattr(tune, "_plan", lambda *_: SimpleNamespace(outdated=()))
    monkeypatch.setattr(run, "run_study", run_study)
    note_delivery(tmp_path, SERVER)
    tracked = study(store, f"sweep.mlflow.tracking_uri={SERVER}")
    tune.run(tracked, tmp_path, SimpleNamespace(), tmp_path / "study.yaml")  # type: ignore[arg-type]
    assert was_delivered(tmp_path, SERVER) is not bool(problems)
