"""Studies that prune and search, from first round to summary, with kills and failures in between."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from modis_dist.evaluate.results import read_history
from modis_dist.execution import run_pack
from modis_dist.execution.trial import Trial
from modis_dist.study import manifest
from modis_dist.study.search import decisions
from modis_dist.train import journal
from modis_dist.train.stack import Member
from tests.bare import skip_figures
from tests.study.toy_study import run_toy_study, write_store

Summary = dict[str, Any]
SPACE = {
    "objective.beta": {"low": 1e-5, "high": 1e-1, "log": True},
    "objective.penalty_weight": {"low": 4, "high": 10},
    "optim.lr": {"choices": [1e-3, 5e-3]},
}
RANDOM = {"probe": False, "grid": {}, "space": SPACE, "search": {"kind": "random", "configurations": 9, "seed": 2}}
PRUNING = {"min_epochs": 2, "factor": 3}
EPOCHS = "optim.epochs=7"  # rungs at 2 and 6


@pytest.fixture(scope="module", autouse=True)
def without_figures() -> Iterator[None]:
    """Figures of refits are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine configurations in two folds, all trained to the end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_toy_study(out, store, EPOCHS, **RANDOM)
    return out


@pytest.fixture(scope="module")
def pruned(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study, pruned."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    run_toy_study(out, store, EPOCHS, **RANDOM, pruning=PRUNING)
    return out


def summary_of(out: Path) -> Summary:
    return json.loads((out / "summary.json").read_text())


def trials_of(out: Path) -> dict[str, list[Trial]]:
    """Return the trials by configuration."""
    trials_by_name: dict[str, list[Trial]] = {}
    for trial in manifest.load(out / "manifest.json").trials:
        trials_by_name.setdefault(json.dumps([trial.condition, trial.params]), []).append(trial)
    return trials_by_name


def without_seconds(summary: Summary) -> Summary:
    return {key: value for key, value in summary.items() if key != "seconds"}


def epochs_read(out: Path) -> dict[str, list[int]]:
    """Return the epochs of every trial in the journals."""
    epochs: dict[str, list[int]] = {}
    for path in out.glob("packs/*/journal.jsonl"):
        for record in journal.read(path):
            if record["kind"] == "metrics":
                epochs.setdefault(record["trial"], []).append(record["step"])
    return epochs


def test_the_promoted_configurations_are_those_of_halving_applied_to_full_histories(whole: Path, pruned: Path) -> None:
    def mean_at(trials: list[Trial], epoch: int) -> float:
        rows = [read_history(whole / "trials" / trial.id)[:epoch] for trial in trials]
        return sum(max(row["val/balanced_accuracy"] or 0 for row in history) for history in rows) / len(rows)

    everyone = trials_of(whole)
    assert everyone.keys() == trials_of(pruned).keys() and len(everyone) == 9
    three = sorted(everyone, key=lambda key: -mean_at(everyone[key], 2))[:3]
    (winner,) = sorted(three, key=lambda key: -mean_at(everyone[key], 6))[:1]
    left = {json.dumps(["all", g["params"]]): (g["pruned"] or {}).get("epoch") for g in summary_of(pruned)["groups"]}
    assert left == {key: None if key == winner else 6 if key in three else 2 for key in everyone}


def test_a_promoted_configuration_trains_like_one_without_pruning(whole: Path, pruned: Path) -> None:
    (survivor,) = [g for g in summary_of(pruned)["groups"] if g["pruned"] is None]
    for name in survivor["trials"]:
        history, expected = (read_history(out / "trials" / name) for out in (pruned, whole))
        assert len(history) == len(expected) == 7
        for epoch, expected_epoch in zip(history, expected, strict=True):
            for key in (key for key in epoch if key.startswith("train/")):
                assert epoch[key] == pytest.approx(expected_epoch[key], rel=2e-3, abs=2e-4), key


def test_a_pruned_trial_has_a_result_with_the_reason_and_no_evaluation(pruned: Path) -> None:
    summary = summary_of(pruned)
    assert summary["trials"] == {"total": 18, "done": 2, "failed": 0, "pruned": 16} and summary["failures"] == {}
    ranks = []
    for group in (g for g in summary["groups"] if g["pruned"]):
        epoch, rank, of = (group["pruned"][key] for key in ("epoch", "rank", "of"))
        assert of == {2: 9, 6: 3}[epoch] and rank > of // 3
        ranks.append((epoch, rank))
        for name in group["trials"]:
            result = json.loads((pruned / "trials" / name / "result.json").read_text())
            assert result["status"] == "pruned" and result["epochs"] == epoch and result["evaluation"] is None
            assert re.findall(r"[\d.]+", result["reason"]) == [str(epoch), f"{group['mean']:.3f}", str(rank), str(of)]
            assert len(read_history(pruned / "trials" / name)) == epoch
            assert not (pruned / "trials" / name / "best").exists()
    assert sorted(ranks) == [(2, rank) for rank in range(4, 10)] + [(6, 2), (6, 3)]
    assert not list(pruned.glob("packs/*/last")), "pruned trials keep no checkpoint"


def test_groups_of_a_search_are_listed_from_best_to_worst_then_the_pruned(whole: Path, pruned: Path) -> None:
    means = [group["mean"] for group in summary_of(whole)["groups"]]
    assert means == sorted(means, reverse=True)
    reached = [(group["pruned"] or {"epoch": 99})["epoch"] for group in summary_of(pruned)["groups"]]
    assert reached == sorted(reached, reverse=True)
    text = (pruned / "report.md").read_text()
    assert text.count("pruned at 2 |") == 6 and text.count("pruned at 6 |") == 2


def test_rerunning_a_finished_study_trains_nothing_and_gives_the_same_summary(store: Path, pruned: Path) -> None:
    before, read = without_seconds(summary_of(pruned)), epochs_read(pruned)
    assert without_seconds(run_toy_study(pruned, store, EPOCHS, **RANDOM, pruning=PRUNING)) == before
    assert epochs_read(pruned) == read
    files = [path.read_bytes() for path in pruned.glob("packs/*/journal.jsonl")]
    run_toy_study(pruned, store, EPOCHS, **RANDOM, pruning=PRUNING)
    assert [path.read_bytes() for path in pruned.glob("packs/*/journal.jsonl")] == files


def test_a_pruned_study_trains_to_the_end_once_pruning_is_removed(store: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = {**RANDOM, "search": {**RANDOM["search"], "configurations": 4}}
    first = run_toy_study(out, store, EPOCHS, **few, pruning=PRUNING)
    assert first["trials"]["pruned"] == 6
    more = run_toy_study(out, store, EPOCHS, **RANDOM, pruning=PRUNING)
    assert [g["pruned"] for g in more["groups"]].count(None) == 1
    assert more["trials"]["done"] + more["trials"]["pruned"] == more["trials"]["total"] == 18
    last = run_toy_study(out, store, EPOCHS, **RANDOM)
    assert last["trials"] == {"total": 18, "done": 18, "failed": 0, "pruned": 0}
    assert all(len(read_history(out / "trials" / name)) == 7 for g in last["groups"] for name in g["trials"])
    assert {json.dumps(g["params"]) for g in last["groups"]} == {
        json.dumps(g["params"]) for g in summary_of(whole)["groups"]
    }


# --- failures and kills -------------------------------------------------------------------------------------


def test_a_crashed_trial_ranks_its_group_last_also_when_rerun(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = run_pack.fit
    sweep = {"probe": False, "grid": {"objective.beta": [1e-4, 1e-3, 1e-2]}, "pruning": PRUNING}

    def out_of_memory(members: Sequence[Member], **settings: Any) -> Any:
        if any(m.run.objective.beta == 1e-4 and m.run.data.split.fold == 1 for m in members):
            raise ZeroDivisionError("poisoned")
        return genuine(members, **settings)

    monkeypatch.setattr(run_pack, "fit", out_of_memory)
    first = run_toy_study(tmp_path / "out", store, EPOCHS, **sweep)
    (lost,) = [group for group in first["groups"] if group["params"] == {"objective.beta": 1e-4}]
    assert lost["pruned"] == {"epoch": 2, "rank": 3, "of": 3} and (lost["n"], lost["failed"]) == (1, 1)
    assert first["trials"] == {"total": 6, "done": 2, "failed": 1, "pruned": 3}
    assert list(first["failures"].values()) == ["ZeroDivisionError: poisoned"]
    monkeypatch.setattr(run_pack, "fit", genuine)
    assert without_seconds(run_toy_study(tmp_path / "out", store, EPOCHS, **sweep)) == without_seconds(first), (
        "decisions are final"
    )


class SimulatedKill(BaseException):
    """Simulated kill of the process."""


def killed_at_last_call(function: Callable[..., Any], calls: dict[str, int], *, after: bool) -> Callable[..., Any]:
    """Wrap a function to raise ``SimulatedKill`` before or after the last of a number of calls."""

    def called(*arguments: Any, **settings: Any) -> Any:
        calls["remaining"] -= 1
        if calls["remaining"] == 0 and not after:
            raise SimulatedKill
        result = function(*arguments, **settings)
        if calls["remaining"] == 0:
            raise SimulatedKill
        return result

    return called


@pytest.mark.parametrize(
    ("module", "name", "calls", "after"),
    [
        (run_pack, "write_interim_result", 3, True),
        (decisions, "write_json", 1, False),
        (decisions, "write_json", 1, True),
    ],
)
def test_a_pack_killed_at_its_rung_keeps_the_checkpoint_that_the_next_rung_resumes_from(
    module: Any, name: str, calls: int, after: bool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grid = tmp_path / "out", {"objective.beta": [1e-4, 1e-3, 1e-2]}
    sweep = {"probe": False, "grid": grid, "folds": 1, "pruning": PRUNING}
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed_at_last_call(getattr(module, name), {"remaining": calls}, after=after))
        with pytest.raises(SimulatedKill):
            run_toy_study(out, store, EPOCHS, **sweep)
    (at_rung,) = out.glob("packs/*/last/step-*")
    genuine, resumed_from = run_pack.fit, []

    def fit(members: Sequence[Member], *, folder: Path, **settings: Any) -> Any:
        resumed_from.append([settings["until"], *folder.glob("last/step-*")])
        return genuine(members, folder=folder, **settings)

    monkeypatch.setattr(run_pack, "fit", fit)
    assert run_toy_study(out, store, EPOCHS, **sweep)["trials"] == {"total": 3, "done": 1, "failed": 0, "pruned": 2}
    assert resumed_from[0] == [None, at_rung] and len(resumed_from) == 2, "the second call is the refit"


def test_a_search_killed_at_every_step_ends_with_the_same_summary(store: Path, tmp_path: Path) -> None:
    sweep = {
        "probe": False,
        "grid": {},
        "space": SPACE,
        "search": {"kind": "optuna", "configurations": 6, "round_size": 4},
        "pruning": {"min_epochs": 1, "factor": 2},
        "conditions": {"mild": {}, "strict": {"objective.classification_weight": 2.0}},
        "packing": {"max_trials": 4},
        "folds": 1,
    }
    uninterrupted = run_toy_study(tmp_path / "uninterrupted", store, "optim.epochs=3", **sweep)
    assert {(g["pruned"] or {}).get("epoch") for g in uninterrupted["groups"]} == {None, 1, 2}
    assert all(condition["test"] for condition in uninterrupted["conditions"])
    watched = (
        (decisions, "write_json"),
        (run_pack, "write_json"),
        (run_pack, "write_interim_result"),
        (run_pack, "evaluate_training"),
        (manifest, "save"),
    )
    kills = 0
    ended: Summary = {}
    for start in range(200):
        with pytest.MonkeyPatch.context() as patch:
            calls = {"remaining": 2 + start % 5}
            for module, name in watched:
                patch.setattr(module, name, killed_at_last_call(getattr(module, name), calls, after=bool(start % 2)))
            try:
                ended = run_toy_study(tmp_path / "out", store, "optim.epochs=3", **sweep)
                break
            except SimulatedKill:
                kills += 1
    assert 10 < kills < 200
    for summary in (ended, summary_of(tmp_path / "out")):
        assert without_seconds(summary) == without_seconds(uninterrupted)
    read, expected = epochs_read(tmp_path / "out"), epochs_read(tmp_path / "uninterrupted")
    assert read == expected and all(steps == list(range(1, len(steps) + 1)) for steps in read.values())
    assert manifest.load(tmp_path / "out/manifest.json") == manifest.load(tmp_path / "uninterrupted/manifest.json")


def test_rounds_are_proposed_from_the_results_of_earlier_rounds(store: Path, tmp_path: Path) -> None:
    search = {"kind": "optuna", "configurations": 5, "round_size": 3}
    sweep = {"probe": False, "grid": {}, "space": SPACE, "folds": 1}
    few = run_toy_study(tmp_path / "out", store, **sweep, search=search)
    assert len(few["groups"]) == 5
    more = run_toy_study(tmp_path / "out", store, **sweep, search={**search, "configurations": 6})
    unmarked = [[{k: v for k, v in g.items() if k not in {"rank", "chosen"}} for g in s["groups"]] for s in (few, more)]
    assert [group for group in unmarked[1] if group in unmarked[0]] == unmarked[0] and len(unmarked[1]) == 6
