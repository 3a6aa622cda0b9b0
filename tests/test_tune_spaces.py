"""Every study in tune_spaces: it loads, its sweep expands, and its networks have the stated sizes."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modis_dist.cli.main import run
from modis_dist.config.parse import build, dump, load_study
from modis_dist.config.run import Run
from modis_dist.config.study import OptunaSearch, Study
from modis_dist.config.yaml12 import parse
from modis_dist.data.store.writer import StoreWriter
from modis_dist.integrations.mlflow.sync import sync
from modis_dist.study.manifest import expand

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "tune_spaces").rglob("*.yaml"))
TABLE_S2 = {  # of the paper's supplement
    "intersim": {"methylation": 1_007_647, "expression": 134_081, "protein": 198_320, "discriminator": 724_744},
    "tcga10": {"methylation": 37_818_524, "mrna": 38_717_524, "mirna": 2_249_346, "discriminator": 1_184_781},
}


def study(name: str) -> Study:
    return load_study(ROOT / "tune_spaces" / f"{name}.yaml")


def test_the_documented_studies_exist() -> None:
    assert {"quickstart", "intersim", "tcga10", "tcga10_small"} <= {path.stem for path in STUDIES}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_expands_to_conditions_by_grid_by_folds_by_replicates(path: Path) -> None:
    loaded = load_study(path)
    assert loaded.name == path.stem
    trials = expand(loaded, "0" * 64, source=str(path))
    sweep = loaded.sweep
    points = math.prod(len(values) for values in sweep.grid.values())
    if isinstance(sweep.search, OptunaSearch):
        points = sweep.search.round_size  # later rounds depend on results
    assert len(trials) == max(len(sweep.conditions), 1) * points * sweep.folds * sweep.replicates
    assert len({trial.id for trial in trials}) == len(trials)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_dumped_with_all_defaults_is_the_same_study(path: Path) -> None:
    loaded = load_study(path)
    assert build(Study, parse(dump(loaded), source="dump"), source="dump") == loaded


@pytest.mark.parametrize("name", TABLE_S2)
def test_the_networks_of_the_paper_have_its_parameter_counts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", str(ROOT / "tune_spaces" / f"{name}.yaml"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"modules": TABLE_S2[name], "total": sum(TABLE_S2[name].values())}
    assert printed["total"] == {"intersim": 2_064_792, "tcga10": 79_970_175}[name]


def test_intersim_has_the_settings_of_figures_2_to_4() -> None:
    loaded = study("intersim")
    assert loaded.sweep.replicates == 10 and len(loaded.sweep.conditions) == 12
    runs = {trial.condition: trial.run for trial in expand(loaded, "", source="intersim")}
    assert all(run.scenario[0].kind == "unpair" for run in runs.values())
    kinds = {name: [step.kind for step in run.scenario[1:]] for name, run in runs.items()}
    assert kinds["supervised"] == []
    assert kinds["target_6_rows_reference_5_percent"] == ["cut_class", "hide_labels"]
    assert Counter(kind for steps in kinds.values() for kind in steps) == {
        "hide_labels": 4,
        "cut_class": 4,
        "drop_pairs": 2,
        "keep_pairs": 2,
    }
    absent, one_row = runs["four_pairs_absent"].scenario[1], runs["four_pairs_1_row"].scenario[1]
    assert absent.pairs == one_row.pairs and len({pair.label for pair in absent.pairs}) == 2


def test_tcga10_is_the_grid_of_the_paper_around_its_chosen_values() -> None:
    loaded = study("tcga10")
    chosen = {"objective.beta": 1e-6, "model.latent": 512, "optim.lr": 1e-4, "objective.penalty_weight": 160.0}
    assert loaded.sweep.folds == 5 and set(loaded.sweep.grid) == set(chosen)
    assert all(value in loaded.sweep.grid[key] for key, value in chosen.items())
    assert loaded.optim.epochs == 4000 and loaded.trainer.early_stopping is None
    assert [step.kind for step in loaded.preprocess.steps("mrna")] == ["standardise", "pca"]


def test_the_run_of_a_trial_is_a_valid_run() -> None:
    (trial, *_) = expand(study("tcga10_small"), "", source="tcga10_small")
    assert build(Run, parse(dump(trial.run), source="dump"), source="dump") == trial.run


UNTRACKED = "sweep.mlflow.enabled=false"


def test_the_quickstart_ends_with_a_test_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["optim.epochs=1", "data.simulate.samples=240", "sweep.executor=local", "sweep.folds=2", UNTRACKED]
    settings = [part for setting in smaller for part in ("--set", setting)]
    assert run(["tune", str(ROOT / "tune_spaces/quickstart.yaml"), *settings, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["trials"]["failed"] == 0 and summary["trials"]["done"] == summary["trials"]["total"] > 1
    assert 0 < summary["test"]["balanced_accuracy"]["mean"] <= 1
    assert "balanced accuracy" in capsys.readouterr().out


# --- every study with little data, small networks and one epoch ---------------------------------------------------

SMALL = ("optim.epochs=1", "model.ratios=[0.05]", "model.latent=4", "model.discriminator=[8]", "optim.batch_size=16")
HERE = ("sweep.executor=local", "sweep.replicates=1", "sweep.folds=1", UNTRACKED)


def ten_cancers(path: Path, features: dict[str, int]) -> Path:
    """Write a store of random numbers with the sizes of ``tcga10_small``."""
    draw = np.random.default_rng(0)
    with StoreWriter(path, source={"kind": "random"}) as writer:
        for modality, p in features.items():
            names = [f"s{n}" for n in range(120)]
            writer.begin(modality, [f"f{n}" for n in range(p)])
            writer.write(
                modality,
                sample_id=names,
                group_id=names,
                label=[f"c{n % 10}" for n in range(120)],
                split=[""] * 120,
                x=draw.standard_normal((120, p)).astype(np.float32),
            )
    return path


@pytest.mark.parametrize("name", [pytest.param("intersim", marks=pytest.mark.slow), "intersim_losses", "tcga10_small"])
def test_a_study_runs_to_its_report(name: str, tmp_path: Path) -> None:
    loaded = study(name)
    if loaded.data.simulate is not None:
        data = ["data.simulate.samples=250"]
    else:
        sizes = {m: net.features or 0 for m, net in loaded.model.modalities.items()}
        data = [f"data.store={ten_cancers(tmp_path / 'store', sizes)}"]
    settings = [word for setting in (*SMALL, *HERE, *data) for word in ("--set", setting)]
    out = tmp_path / "out"
    assert run(["tune", str(ROOT / "tune_spaces" / f"{name}.yaml"), "--out", str(out), *settings]) == 0
    summary = json.loads((out / "summary.json").read_text())
    conditions = list(loaded.sweep.conditions) or ["all"]
    assert [condition["condition"] for condition in summary["conditions"]] == conditions
    assert all(condition["test"]["balanced_accuracy"]["n"] == 1 for condition in summary["conditions"])
    text = (out / "report.md").read_text()
    assert all(condition.replace("_", "\\_") in text for condition in conditions if condition != "all")


def test_the_search_study_runs_its_rounds_and_prunes(tmp_path: Path) -> None:
    search = ("sweep.search.configurations=5", "sweep.search.round_size=3", "sweep.pruning.min_epochs=1")
    longer = [setting.replace("optim.epochs=1", "optim.epochs=2") for setting in SMALL]
    smaller = (*longer, *HERE, *search, "data.simulate.samples=120", "sweep.probe=false")
    settings = [word for setting in smaller for word in ("--set", setting)]
    assert run(["tune", str(ROOT / "tune_spaces/search.yaml"), "--out", str(tmp_path / "out"), *settings]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["trials"] == {"total": 5, "done": 2, "failed": 0, "pruned": 3}, "a third, then a half"
    tracked = sync(tmp_path / "out")
    assert tracked.complete and tracked.trials == 5 + 1
    assert summary["test"]["balanced_accuracy"]["n"] == 1
