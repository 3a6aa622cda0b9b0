"""A study from its YAML file to its summary, in this process; kills and failures in between."""

import json
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import modis_dist
from modis_dist.cli.main import run as command
from modis_dist.evaluate import results
from modis_dist.execution import run_pack
from modis_dist.integrations.mlflow.store import only_writer
from modis_dist.integrations.mlflow.sync import sync
from modis_dist.study import manifest
from modis_dist.train.journal import read
from modis_dist.train.stack import Member
from tests.study.toy_study import COMMAND, write_store, write_study
from tests.train import toy


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of 2 x 2 trials with two refits."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder / "study.yaml", write_store(folder / "store"), replicates=2)
    assert command(["tune", str(study), "--out", str(folder / "out"), "--json"]) == 0
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "summary.json").read_text())


def tune(folder: Path, *arguments: str) -> int:
    return command(["tune", str(folder / "study.yaml"), "--out", str(folder / "out"), *arguments])


def test_a_grid_study_passes_no_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "modis_dist.study.run.run_search", lambda *_, **__: pytest.fail("a grid was trained as a search")
    )
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), folds=1, probe=False)
    assert command(["tune", str(study), "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").glob("trials/*/interim_result.json")) == []


def test_the_summary_has_what_scripts_read(done: Path) -> None:
    summary = summary_of(done)
    assert summary["study"] == "toy"
    assert summary["trials"] == {"total": 8, "done": 8, "failed": 0, "pruned": 0}
    assert set(summary["best"]) >= {"params", "mean", "sd", "n"}
    assert summary["best"]["n"] == 4 and summary["metric"] == "balanced_accuracy"
    for part in ("test", "baseline"):
        assert summary[part]["balanced_accuracy"]["n"] == 2
        assert {f"balanced_accuracy/{m}" for m in toy.SIZES} <= set(summary[part])
    assert 0 <= summary["conditions"][0]["probe"]["knn"]["mean"] <= 1
    assert summary["mlflow"] == {"uri": None, "experiment": None}, "it is not tracked"


def test_the_chosen_configuration_has_the_best_mean_over_folds_and_replicates(done: Path) -> None:
    listed = json.loads((done / "out" / "manifest.json").read_text())["trials"]
    values: dict[float, list[float]] = {}
    for trial in listed:
        result = json.loads((done / "out" / "trials" / trial["id"] / "result.json").read_text())
        values.setdefault(trial["params"]["objective.beta"], []).append(result["value"])
    means = {beta: float(np.mean(result)) for beta, result in values.items()}
    best = summary_of(done)["best"]
    assert best["params"]["objective.beta"] == max(means, key=lambda beta: means[beta])
    assert best["mean"] == pytest.approx(max(means.values()))


def test_only_the_refits_of_the_chosen_configuration_are_scored_on_test_rows(done: Path) -> None:
    listed = {t["id"] for t in json.loads((done / "out" / "manifest.json").read_text())["trials"]}
    evaluated = {
        p.parent.name: json.loads(p.read_text())["evaluated_on"] for p in (done / "out/trials").glob("*/result.json")
    }
    assert {name for name, rows in evaluated.items() if rows == "validation"} == listed
    assert len(evaluated) == len(listed) + 2


def test_running_the_same_command_again_trains_nothing(done: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (done / "out" / "trials").rglob("*") if p.is_file()}
    summary = summary_of(done)
    assert tune(done) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    after = summary_of(done)
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_outputs_are_private_and_hold_no_pickle(done: Path) -> None:
    files = list((done / "out").rglob("*"))
    assert len(files) > 50
    assert not [path for path in files if path.stat().st_mode & 0o077]
    assert not {path.suffix for path in files} & {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"}


def epochs_trained(out: Path) -> dict[str, int]:
    """Return the number of epochs in all journals by trial, including repeated ones."""
    counts: dict[str, int] = {}
    for journal in out.glob("packs/*/journal.jsonl"):
        for line in journal.read_text().splitlines():
            record = json.loads(line)["record"]
            counts[record["trial"]] = counts.get(record["trial"], 0) + (record["kind"] == "metrics")
    return counts


def test_a_larger_grid_trains_only_new_trials_and_a_smaller_one_names_outdated_ones(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = epochs_trained(done / "out")
    grid = {"objective.beta": [1e-4, 1e-2, 1e-3]}
    study = write_study(done / "larger.yaml", done / "store", replicates=2, grid=grid)
    assert command(["tune", str(study), "--out", str(done / "out")]) == 0
    after = epochs_trained(done / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) >= len(before) + 4
    assert summary_of(done)["trials"]["total"] == 12
    assert "note:" not in capsys.readouterr().err
    assert tune(done) == 0
    assert "note: 4 trials " in capsys.readouterr().err
    assert epochs_trained(done / "out") == after


def test_equal_conditions_are_trained_once_and_listed_twice(tmp_path: Path) -> None:
    same = {"default": {}, "pairwise": {"objective.adversarial_loss": "pairwise"}}
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={}, conditions=same)
    assert tune(tmp_path) == 0
    summary = summary_of(tmp_path)
    assert summary["trials"] == {"total": 2, "done": 2, "failed": 0, "pruned": 0}
    assert [c["condition"] for c in summary["conditions"]] == ["default", "pairwise"]
    assert summary["conditions"][0]["test"] == summary["conditions"][1]["test"] is not None
    before = epochs_trained(tmp_path / "out")
    assert set(before.values()) <= {4, summary["best"]["epochs"]} and len(before) == 3
    renamed = {"plain": {}, "pairwise": {"objective.adversarial_loss": "pairwise"}}
    write_study(tmp_path / "study.yaml", tmp_path / "store", grid={}, conditions=renamed)
    assert tune(tmp_path, "--set", "trainer.log_every=2") == 0
    assert [c["condition"] for c in summary_of(tmp_path)["conditions"]] == ["plain", "pairwise"]
    assert epochs_trained(tmp_path / "out") == before


def test_a_study_without_a_model_removes_the_model_of_an_earlier_start(tmp_path: Path) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={})
    assert tune(tmp_path) == 0 and (tmp_path / "out" / "model").exists()
    assert tune(tmp_path, "--set", "optim.lr=10", "--set", "optim.epochs=12") == 3
    assert not (tmp_path / "out" / "model").exists()


def test_a_missing_device_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    assert tune(tmp_path, "--set", "trainer.device=cuda:63") == 2
    assert "trainer.device: cuda:63 " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_password_in_the_tracking_address_is_refused_before_it_is_written_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    assert tune(tmp_path, "--set", "sweep.mlflow.tracking_uri=http://alice:s3cret@127.0.0.1:9") == 2
    stderr = capsys.readouterr().err
    assert "sweep.mlflow.tracking_uri: " in stderr and "s3cret" not in stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    assert tune(tmp_path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trials"] == 4 and sum(p["trials"] for p in plan["packs"]) == 4
    assert plan["seconds"] > 0 and plan["bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_one_diverging_configuration_does_not_end_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={"optim.lr": [1e-3, 10.0]})
    assert tune(tmp_path, "--set", "optim.epochs=12") == 4
    assert "trial(s) failed" in capsys.readouterr().err
    summary = summary_of(tmp_path)
    assert summary["trials"]["failed"] == 2 and summary["trials"]["done"] == 2
    assert summary["best"]["params"] == {"optim.lr": 1e-3}
    assert all(" is " in reason for reason in summary["failures"].values())


def test_a_trial_that_crashes_its_pack_fails_alone_and_is_the_only_one_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    genuine = run_pack.fit

    def out_of_memory(members: Sequence[Member], **settings: Any) -> Any:
        if any(m.run.objective.beta == 1e-2 and m.run.data.split.fold == 1 for m in members):
            raise MemoryError("poisoned")
        return genuine(members, **settings)

    monkeypatch.setattr(run_pack, "fit", out_of_memory)
    assert tune(tmp_path) == 4
    output = capsys.readouterr().err
    assert "1 trial(s) failed (" in output and "optim.batch_size 8;" in output
    summary = summary_of(tmp_path)
    assert summary["trials"] == {"total": 4, "done": 3, "failed": 1, "pruned": 0}
    assert summary["best"]["params"] == {"objective.beta": 1e-4} and summary["best"]["n"] == 2
    before = epochs_trained(tmp_path / "out")
    monkeypatch.setattr(run_pack, "fit", genuine)
    assert tune(tmp_path) == 0
    after = epochs_trained(tmp_path / "out")
    assert summary_of(tmp_path)["trials"] == {"total": 4, "done": 4, "failed": 0, "pruned": 0}
    (poisoned,) = summary["failures"]
    assert {name: after[name] for name in before} == before and poisoned not in before and after[poisoned] == 4


def test_trials_finished_before_their_stack_crashed_keep_their_results_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"))
    genuine, concluded = run_pack.evaluate_training, []

    def failing_once(member: Member, *given: Any, **named: Any) -> Any:
        concluded.append(member.trial)
        if len(concluded) == 3:
            raise RuntimeError("once")
        return genuine(member, *given, **named)

    monkeypatch.setattr(run_pack, "evaluate_training", failing_once)
    assert tune(tmp_path) == 0
    out = tmp_path / "out"
    listed = manifest.load(out / "manifest.json")
    assert [len(pack) for pack in listed.packs] == [1, 1, 1, 1]
    assert {name for pack in listed.packs for name in pack} == {trial.id for trial in listed.trials}
    for trial in listed.trials:
        records = read(run_pack.journal_file(out, run_pack.Pack((trial,))))
        assert [r["step"] for r in records if r["kind"] == "metrics"] == [1, 2, 3, 4]
        assert {r["trial"] for r in records} == {trial.id}
    assert sorted(concluded[:2]) == sorted(set(concluded[:2])) and not set(concluded[:2]) & set(concluded[3:])


def test_test_rows_without_labels_are_reported_as_such(tmp_path: Path) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store", blind=20), grid={})
    assert tune(tmp_path, "--set", "data.split.test=stored") == 0
    summary = summary_of(tmp_path)
    nothing = {"mean": None, "sd": None, "n": 0}
    assert summary["test"]["balanced_accuracy"] == summary["baseline"]["balanced_accuracy"] == nothing
    assert summary["best"]["mean"] is not None
    assert "| all | - |" in (tmp_path / "out" / "report.md").read_text()


def test_a_baseline_of_fewer_rows_is_not_compared(tmp_path: Path) -> None:
    scenario = [{"kind": "hide_labels", "keep": 0, "modalities": ["cnv", "rppa"]}]
    write_study(
        tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={}, conditions={"few": {"scenario": scenario}}
    )
    assert tune(tmp_path) == 0
    summary = summary_of(tmp_path)
    assert summary["baseline"]["balanced_accuracy"]["n"] == 0, "the baseline covers one modality only"
    assert summary["baseline"]["balanced_accuracy/mirna"]["n"] == 1 and summary["groups"][0]["baseline"] is None
    assert "balanced_accuracy/cnv" not in summary["baseline"] and summary["test"]["balanced_accuracy"]["n"] == 1


def test_conditions_with_other_modalities_and_classes_are_planned_on_their_own_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditions = {
        "two": {"data.modalities": ["mirna", "cnv"]},
        "all": {},
        "rare": {"data.classes": ["a", "b", "c"], "scenario": [{"kind": "cut_class", "label": "c", "rows": 4}]},
    }
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={}, conditions=conditions)
    assert tune(tmp_path, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert {pack["steps_per_training"] for pack in plan["packs"]} == {12, 16}, "rppa has fewer rows than the other two"
    assert tune(tmp_path, "--set", "data.classes=[a, b]") == 0
    assert list((tmp_path / "out").glob("packs/*/error.txt")) == []
    labels = {c["condition"]: list(c["details"]["per_class"]) for c in summary_of(tmp_path)["conditions"]}
    assert labels == {"two": ["a", "b"], "all": ["a", "b"], "rare": ["a", "b", "c"]}


def test_the_model_of_every_condition_is_named_and_its_metrics_are_in_mlflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditions = {"weak": {"objective.penalty_weight": 1.0}, "strong": {"objective.penalty_weight": 10.0}}
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={}, conditions=conditions)
    assert tune(tmp_path) == 0
    sync(tmp_path / "out")
    output, summary = capsys.readouterr().out, summary_of(tmp_path)
    models = {c["condition"]: c["model"] for c in summary["conditions"]}
    assert summary["model"] == models["weak"] and re.search(r"model .*\bweak, seed 0\.", output)
    assert re.search(rf"model .*\bstrong, seed 0 .*{models['strong']['folder']}\.", output)
    delivered, other = (modis_dist.load(tmp_path / "out" / f) for f in ("model", models["strong"]["folder"]))
    assert delivered.trial == models["weak"]["folder"].removeprefix("trials/") != other.trial
    with closing(sqlite3.connect(f"file:{tmp_path}/out/mlflow.db?mode=ro", uri=True)) as database:
        query = "select r.name, m.key, m.value from latest_metrics m join runs r using (run_uuid)"
        sent = {(name.split(" (")[0], key): value for name, key, value in database.execute(query)}
    for condition in summary["conditions"]:
        name, mean = condition["condition"], condition["test"]["balanced_accuracy"]["mean"]
        assert sent["toy", f"test/{name}/balanced_accuracy"] == mean
        assert sent["toy", f"test/{name}/probe/knn"] == condition["probe"]["knn"]["mean"]
        assert sent[f"refit {name}: seed 0", "final/balanced_accuracy"] == mean
        baseline = condition["baseline"]["balanced_accuracy"]["mean"]
        assert sent[f"refit {name}: seed 0", "final/baseline/balanced_accuracy"] == baseline


def test_a_resumed_pack_keeps_the_threads_of_its_first_start(done: Path, tmp_path: Path) -> None:
    trials = manifest.load(done / "out" / "manifest.json").trials
    pack = run_pack.Pack(trials[:2])
    folder = run_pack.save_pack(tmp_path, pack, threads=1)
    assert run_pack.load_pack(folder) == (pack, 1)
    run_pack.save_pack(tmp_path, pack, threads=2)
    assert run_pack.load_pack(folder) == (pack, 1)


def test_without_a_complete_configuration_nothing_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), grid={"optim.lr": [10.0]})
    assert tune(tmp_path, "--set", "optim.epochs=12") == 3
    assert f"{tmp_path / 'out'}: no configuration " in capsys.readouterr().err
    assert list((tmp_path / "out").glob("packs/*/error.txt")) == [], "a diverged training is not a crash"
    assert summary_of(tmp_path)["best"] is None


def test_a_second_driver_on_the_same_folder_is_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    with (done / "out" / "lock").open("a") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        assert tune(done) == 2
    assert re.search(rf"{done / 'out'}: .*\bprocess\b", capsys.readouterr().err)


def _stopped_while_running(study: Path, out: Path) -> int:
    """Start the study and interrupt it when the first trial has a result but not all; return the exit status."""
    with (out.parent / "stderr.txt").open("w") as output:
        process = subprocess.Popen([*COMMAND, "tune", str(study), "--out", str(out)], stderr=output)
    end = time.monotonic() + 120
    while not list(out.glob("trials/*/result.json")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None, "the study ended before it could be stopped"
    process.send_signal(signal.SIGINT)
    return process.wait(180)


def _mlflow_states(out: Path) -> list[tuple[str, str]]:
    """Return name and status of every run in a study's database, once no process writes to it."""
    with only_writer(out, wait=True):
        pass
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as database:
        return database.execute("select name, status from runs").fetchall()


@pytest.mark.slow
def test_an_interrupted_study_resumes_without_losing_or_repeating_a_trial(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    settings = {"packing": {"enabled": False}, "folds": 3, "mlflow": {}}
    study = write_study(tmp_path / "study.yaml", store, **settings)
    out = tmp_path / "out"
    status = _stopped_while_running(study, out)
    finished = {p: p.stat().st_mtime_ns for p in out.glob("trials/*/result.json")}
    assert 0 < len(finished) < 7
    stderr_lines = [
        line for line in (tmp_path / "stderr.txt").read_text().splitlines() if not line.startswith("note: MLflow")
    ]
    assert stderr_lines[0].startswith("SIGINT: ") and stderr_lines[0].count("SIGINT") == 2
    assert (
        stderr_lines[1].startswith("got SIGINT")
        and stderr_lines[1].endswith("rerun the same command to resume")
        and len(stderr_lines) == 2
    )
    states = _mlflow_states(out)
    assert status == 75 and [state for name, state in states if name.startswith("toy")] == ["KILLED"]
    assert sum(state == "FINISHED" for _, state in states) == len(finished)
    assert {state for _, state in states} <= {"FINISHED", "KILLED"}
    assert tune(tmp_path) == 0
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "a finished trial was run again"
    uninterrupted = tmp_path / "uninterrupted"
    assert command(["tune", str(study), "--out", str(uninterrupted), "--set", "sweep.mlflow.enabled=false"]) == 0
    assert {state for _, state in _mlflow_states(out)} == {"FINISHED"}
    assert summary_of(tmp_path)["mlflow"] == {"uri": f"sqlite:///{out}/mlflow.db", "experiment": "toy"}
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (out, uninterrupted))
    for part in ("trials", "best", "test", "baseline", "groups"):
        assert summary[part] == expected[part], part


# --- using the model ----------------------------------------------------------------------------------------


def test_the_delivered_model_predicts_the_same_in_python_and_on_the_command_line(done: Path) -> None:
    target = done / "p.parquet"
    assert command(["predict", str(done / "out"), str(done / "store"), "--out", str(target)]) == 0
    table = pq.read_table(target).to_pandas()
    assert len(table) == 90 + 90 + 60 and set(table["modality"]) == set(toy.SIZES)
    assert np.allclose(table[[f"p({c})" for c in toy.CLASSES]].sum(axis=1), 1, atol=1e-5)
    cohort = toy.cohort()
    frame = pd.DataFrame(cohort.x["cnv"], columns=list(cohort.features["cnv"])).assign(
        sample_id=cohort.selection.index["cnv"].sample_id
    )
    again = modis_dist.load(done / "out").predict(frame.iloc[:, ::-1], modality="cnv")
    cnv = table[table["modality"] == "cnv"].reset_index(drop=True)
    assert list(again["predicted"]) == list(cnv["predicted"])
    assert np.allclose(again["probability"], cnv["probability"], atol=1e-6)


def test_embeddings_and_translations_have_the_right_shape_and_units(done: Path) -> None:
    target = done / "e.parquet"
    assert command(["embed", str(done / "out"), str(done / "store"), "--out", str(target)]) == 0
    assert [c for c in pq.read_table(target).column_names if c.startswith("z")] == ["z0", "z1", "z2", "z3"]
    target = done / "t.parquet"
    arguments = ["translate", str(done / "out"), str(done / "store"), "--out", str(target)]
    assert command([*arguments, "--from", "mirna", "--to", "cnv"]) == 0
    table = pq.read_table(target).to_pandas()
    cohort = toy.cohort()
    assert list(table.columns) == ["modality", "sample_id", *cohort.features["cnv"]]
    spread = table[list(cohort.features["cnv"])].to_numpy().mean(0) - cohort.x["cnv"].mean(0)
    assert np.abs(spread).max() < 1.0, "in the units of the data, around its means"


def test_evaluate_scores_the_test_rows_and_the_baseline(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert command(["evaluate", str(done / "out"), str(done / "store"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == "test" and scores["baseline"]["modalities"].keys() == toy.SIZES.keys()
    refit = json.loads((done / "out" / "model" / results.RESULT).read_text())
    assert scores["evaluation"]["classification"] == refit["evaluation"]["classification"]


def test_evaluate_on_another_store_scores_all_rows(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_store(tmp_path / "other", samples=60)
    capsys.readouterr()
    assert command(["evaluate", str(done / "out"), str(other), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["rows"] == "all" and scores["baseline"] is None
    assert command(["evaluate", str(done / "out"), str(other)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{out}", "{nowhere}", "--out", "x.parquet"], "nowhere"),
        (["predict", "{nowhere}", "{store}", "--out", "x.parquet"], "does not exist"),
        (["translate", "{out}", "{store}", "--from", "rna", "--to", "cnv", "--out", "x.parquet"], "no modality rna"),
        (["translate", "{out}", "{store}", "--from", "cnv", "--to", "rna", "--out", "x.parquet"], "no modality 'rna'"),
    ],
)
def test_wrong_use_of_a_model_is_a_one_line_error(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"out": done / "out", "store": done / "store", "nowhere": tmp_path / "nowhere"}
    capsys.readouterr()
    filled = [a.format(**places) if a != "x.parquet" else str(tmp_path / a) for a in arguments]
    assert command(filled) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and output.count("\n") == 1 and message in output
    assert not (tmp_path / "x.parquet").exists()


# --- single runs --------------------------------------------------------------------------------------------


def test_the_run_yaml_of_a_finished_trial_trains_the_same_model(done: Path, tmp_path: Path) -> None:
    trained = done / "out" / "model"
    assert command(["train", str(trained / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    retrained = modis_dist.load(tmp_path / "again")
    original = modis_dist.load(trained)
    assert retrained.trial == original.trial
    cohort = toy.cohort()
    for modality in toy.SIZES:
        probabilities, expected = (
            p.probabilities(cohort.x[modality], modality=modality) for p in (retrained, original)
        )
        assert np.abs(probabilities - expected).max() < 1e-3


def test_train_writes_a_result_figures_and_refuses_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "store")
    path = write_study(tmp_path / "run.yaml", store)
    path.write_text(path.read_text().split("sweep:")[0])
    out = tmp_path / "out"
    assert command(["train", str(path), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["status"] == "done" and result["evaluated_on"] == "validation"
    assert {p.name for p in (out / "figures").iterdir()} == {
        "loss_curves.png",
        "latent_pca.png",
        "confusion.png",
        "mse_heatmap.png",
    }
    assert command(["train", str(path), "--out", str(out)]) == 0
    assert command(["train", str(path), "--out", str(out), "--set", "seed=4"]) == 2
    assert f"{out}: contains another run" in capsys.readouterr().err


def test_a_diverging_run_exits_with_3_and_names_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path / "run.yaml", write_store(tmp_path / "store"))
    path.write_text(path.read_text().split("sweep:")[0])
    wild = ["--set", "optim.lr=10", "--set", "objective.beta=1e6", "--set", "optim.epochs=20"]
    assert command(["train", str(path), "--out", str(tmp_path / "out"), *wild]) == 3
    output = capsys.readouterr().err
    assert output.startswith("error: ") and "step " in output and output.count("\n") == 1
