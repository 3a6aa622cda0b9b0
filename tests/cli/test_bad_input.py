"""Invalid input to every command: exit 2, one line that names the file or key, no output, torch not imported."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modis_dist.cli.main import run
from modis_dist.config import yaml12

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run in an empty folder."""
    before = os.umask(0o077)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    os.umask(before)


def without_sweep(study: str) -> str:
    """Remove the sweep from a study file, which makes it a run."""
    path = Path(study)
    tree = yaml12.read(path)
    tree.pop("sweep")
    path.write_text(yaml12.dump(tree))
    return study


def study(toy_store: Path, tmp_path: Path, **sections: object) -> str:
    """Write a small study of the toy store, with some sections replaced."""
    tree: dict[str, object] = {
        "name": "toy",
        "data": {"store": str(toy_store)},
        "model": {"latent": 4, "ratios": [0.1], "discriminator": [8]},
        "optim": {"epochs": 1, "batch_size": 8},
        "sweep": {"executor": "local"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml12.dump(tree | sections))
    return str(path)


def refused(capsys: Captured, *arguments: str) -> str:
    """Return the one-line error of a command that exits with 2 and leaves the folder unchanged."""
    before = sorted(Path().rglob("*"))
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
    assert sorted(Path().rglob("*")) == before
    return printed.err


COMMANDS_ON_YAML = [["tune"], ["tune", "--dry-run"], ["train", "--out", "out"], ["model"], ["config"]]


@pytest.mark.parametrize("command", COMMANDS_ON_YAML, ids=" ".join)
def test_a_missing_study_a_folder_and_a_table_are_refused_by_path(command: list[str], capsys: Captured) -> None:
    Path("folder").mkdir()
    Path("table.csv").write_text("a,b\n1,2\n")
    Path("table.parquet").write_bytes(b"PAR1\0\0")
    assert "error: no.yaml: " in refused(capsys, *command, "no.yaml")
    assert "error: folder: " in refused(capsys, *command, "folder")
    assert "error: table.csv: " in refused(capsys, *command, "table.csv")
    assert "error: table.parquet: " in refused(capsys, *command, "table.parquet")


@pytest.mark.parametrize("command", COMMANDS_ON_YAML, ids=" ".join)
def test_mistakes_of_a_study_are_refused_by_key(
    command: list[str], toy_store: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = without_sweep(study(toy_store, tmp_path, optim={"lrr": 1, "epochs": 0}, fp16=True))
    error = refused(capsys, *command, file)
    assert "study.yaml: 3 " in error and "optim.lrr: unknown key; did you mean 'lr'?" in error
    assert "optim.epochs: must be >= 1 (got 0)" in error and "fp16: unknown key" in error


def test_train_refuses_a_study(toy_store: Path, tmp_path: Path, capsys: Captured) -> None:
    error = refused(capsys, "train", study(toy_store, tmp_path), "--out", "out")
    assert "study.yaml: sweep: " in error and "`modis-dist tune`" in error


def test_a_run_without_a_sweep_is_a_study_of_one_trial(toy_store: Path, tmp_path: Path, capsys: Captured) -> None:
    file = without_sweep(study(toy_store, tmp_path))
    assert run(["tune", file, "--dry-run", "--json", "--set", "sweep.executor=local"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 1
    assert not list(Path().iterdir())


# --- the store ------------------------------------------------------------------------------------------------


def newer(store: Path) -> None:
    manifest = store / "manifest.json"
    tree = json.loads(manifest.read_text())
    key = next(name for name in tree if "version" in name)
    manifest.write_text(json.dumps({**tree, key: 99}))


@pytest.mark.parametrize(
    "command", [["tune"], ["tune", "--dry-run"], ["train", "--out", "out"], ["model"]], ids=" ".join
)
def test_a_study_without_a_valid_store_is_refused(
    command: list[str], toy_store: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = without_sweep(study(toy_store, tmp_path, data={}))
    assert "study.yaml: data.store: " in refused(capsys, *command, file)
    error = refused(capsys, *command, file, "--set", "data.store=nowhere")
    assert "data.store: " in error and "nowhere" in error and "`modis-dist data import" in error
    Path("empty").mkdir()
    assert "empty" in refused(capsys, *command, file, "--set", "data.store=empty")
    shutil.copytree(toy_store, "newer")
    newer(Path("newer"))
    error = refused(capsys, *command, file, "--set", "data.store=newer")
    assert "newer" in error and "99" in error
    shutil.copytree(toy_store, "damaged")
    shard = next(Path("damaged/protein").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(capsys, *command, file, "--set", "data.store=damaged")


@pytest.mark.parametrize("command", [["data", "check"], ["data", "describe"]], ids=" ".join)
def test_check_and_describe_refuse_paths_that_are_not_stores(
    command: list[str], toy_store: Path, capsys: Captured
) -> None:
    assert "nowhere" in refused(capsys, *command, "nowhere")
    Path("file").write_text("x")
    assert "file" in refused(capsys, *command, "file")
    Path("empty").mkdir()
    assert "empty" in refused(capsys, *command, "empty")
    shutil.copytree(toy_store, "newer")
    newer(Path("newer"))
    assert "99" in refused(capsys, *command, "newer")


def test_a_failed_import_leaves_no_store(capsys: Captured) -> None:
    Path("empty").mkdir()
    assert "nowhere" in refused(capsys, "data", "import", "nowhere", "--out", "store")
    assert "empty" in refused(capsys, "data", "import", "empty", "--out", "store")
    Path("bad").mkdir()
    Path("bad/mirna.csv").write_text("sample,label,a\ns1,x,1\n")
    assert "mirna.csv" in refused(capsys, "data", "import", "bad", "--out", "store")
    Path("taken").write_text("mine")
    assert "taken" in refused(capsys, "data", "simulate", "intersim", "--out", "taken", "--samples", "30")
    for modality in ("mirna", "cnv"):
        Path(f"bad/{modality}.csv").write_text("sample_id,label,a\ns1,x,1\n")
    assert "taken" in refused(capsys, "data", "import", "bad", "--out", "taken")
    assert "samples: must be >= 10" in refused(capsys, "data", "simulate", "intersim", "--out", "s", "--samples", "1")


# --- names and numbers that do not fit the data ---------------------------------------------------------------

MISFITS: dict[str, tuple[dict[str, object], str]] = {
    "modality of data": ({"data": {"modalities": ["protien", "expression"]}}, "did you mean 'protein'?"),
    "class of data": ({"data": {"classes": ["1", "7"]}}, "data.classes: '7'"),
    "modality of preprocess": (
        {"preprocess": {"modalities": {"expresion": ["minmax"]}}},
        "; did you mean 'expression'?",
    ),
    "class of scenario": (
        {"scenario": [{"kind": "cut_class", "label": "one", "rows": 3}]},
        "scenario[0].label: unknown class 'one'",
    ),
    "modality of scenario": (
        {"scenario": ["unpair", {"kind": "hide_labels", "keep": 1, "modalities": ["methylatoin"]}]},
        "scenario[1].modalities[0]: unknown modality 'methylatoin'; did you mean 'methylation'?",
    ),
    "pair of scenario": (
        {"scenario": [{"kind": "drop_pairs", "pairs": [{"label": "1", "modality": "rna"}]}]},
        "scenario[0].pairs[0].modality: unknown modality 'rna'",
    ),
    "modality of model": ({"model": {"modalities": {"protean": {}}}}, "model.modalities.protean: "),
    "features of model": (
        {"model": {"modalities": {"protein": {"features": 9}}}},
        "model.modalities.protein.features: is 9",
    ),
    "classes of model": ({"model": {"classes": 9}}, "model.classes: is 9"),
    "components": ({"preprocess": {"default": [{"kind": "pca", "components": 5000}]}}, "5000"),
    "features kept": ({"preprocess": {"default": [{"kind": "variance_filter", "features": 5000}]}}, "5000"),
    "everything removed": (
        {"scenario": [{"kind": "cut_class", "label": label, "rows": 0} for label in "123"]},
        "scenario: ",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_names_and_numbers_that_do_not_fit_the_data_are_refused_by_key(
    misfit: str, toy_store: Path, tmp_path: Path, capsys: Captured
) -> None:
    sections, reason = MISFITS[misfit]
    if "data" in sections:
        sections = {"data": {"store": str(toy_store), **sections["data"]}}  # type: ignore[dict-item]
    file = study(toy_store, tmp_path, **sections)
    error = refused(capsys, "tune", file)
    assert reason in error


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["sweep.folds=50"], "fold"),
        (["sweep.folds=3", "data.split={folds: 3, fold: 0}"], "data.split.folds: "),
        (["data.split.validation_fraction=0"], "data.split.validation_fraction: "),
        (["sweep.grid={optim.lrr: [1]}"], "optim.lrr: unknown key; did you mean 'lr'?"),
        (["sweep.grid={optim.lr: []}"], "sweep.grid.optim.lr: "),
        (["sweep.grid={optim.lr: 1e-3}"], "sweep.grid.optim.lr: "),
        (["sweep.grid={optim.lr: [fast]}"], "optim.lr: must be a number (got 'fast')"),
        (["sweep.grid={data.store: [a, b]}"], "sweep.grid: data.store: "),
        (["sweep.grid={seed: [1, 2]}"], "sweep.grid: seed: "),
        (["sweep.conditions={a: {optim.lr: 1}}", "sweep.grid={optim.lr: [1]}"], "sweep: optim.lr "),
        (["sweep.replicates=10000", "sweep.folds=100"], "sweep: 1000000 trials"),
        (["sweep.conditions={'a b': {}}"], "sweep.conditions.a b: "),
        (
            [
                "preprocess.modalities.protein=[]",
                "sweep.grid={model.modalities.protein.likelihood: [gaussian, bernoulli]}",
            ],
            "model.modalities.protein.likelihood bernoulli",
        ),
    ],
)
def test_impossible_sweeps_are_refused_by_key(
    settings: list[str], reason: str, toy_store: Path, tmp_path: Path, capsys: Captured
) -> None:
    file = study(toy_store, tmp_path)
    assert reason in refused(capsys, "tune", file, *(part for text in settings for part in ("--set", text)))


def test_a_mistake_in_the_sweep_of_a_simulated_study_is_reported_before_anything_is_simulated(
    tmp_path: Path, toy_store: Path, capsys: Captured
) -> None:
    file = study(toy_store, tmp_path, data={"simulate": {"samples": 60}})
    assert "optim.lrr" in refused(capsys, "tune", file, "--set", "sweep.grid={optim.lrr: [1]}")


# --- outputs and models ---------------------------------------------------------------------------------------


def test_an_out_that_is_a_file_or_below_one_is_refused(toy_store: Path, tmp_path: Path, capsys: Captured) -> None:
    file = without_sweep(study(toy_store, tmp_path))
    Path("taken").write_text("mine")
    for command in ("tune", "train"):
        assert "taken" in refused(capsys, command, file, "--set", "trainer.device=cpu", "--out", "taken")
        assert "taken" in refused(capsys, command, file, "--set", "trainer.device=cpu", "--out", "taken/below")
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize("command", ["predict", "embed", "translate", "evaluate"])
def test_a_folder_without_a_model_and_a_missing_store_are_refused(
    command: str, toy_store: Path, capsys: Captured
) -> None:
    options = {"evaluate": [], "translate": ["--out", "f.parquet", "--from", "protein", "--to", "expression"]}
    rest = options.get(command, ["--out", "f.parquet"])
    Path("empty").mkdir()
    Path("file").write_text("x")
    assert "'nowhere' does not exist" in refused(capsys, command, "nowhere", str(toy_store), *rest)
    assert "'nowhere' does not exist" in refused(capsys, command, "empty", "nowhere", *rest)
    assert "'file' is a file" in refused(capsys, command, "file", str(toy_store), *rest)
    assert "empty" in refused(capsys, command, "empty", str(toy_store), *rest)


def test_ui_refuses_a_folder_without_results(capsys: Captured) -> None:
    Path("empty").mkdir()
    assert "nowhere" in refused(capsys, "ui", "nowhere")
    assert "empty" in refused(capsys, "ui", "empty")


def test_mistakes_that_need_no_torch_are_reported_without_loading_it(toy_store: Path, tmp_path: Path) -> None:
    file = study(toy_store, tmp_path)
    commands = [
        ["tune", "no.yaml"],
        ["tune", file, "--set", "optim.lrr=1"],
        ["tune", file, "--set", "data.store=nowhere"],
        ["train", file, "--out", "out"],
        ["model", "no.yaml"],
        ["predict", "nowhere", str(toy_store), "--out", "f.parquet"],
        ["evaluate", "nowhere", str(toy_store)],
        ["ui", "nowhere"],
    ]
    script = (
        "import sys, time; started = time.process_time()\n"
        "from modis_dist.cli.main import run\n"
        f"codes = [run(arguments) for arguments in {commands!r}]\n"
        "heavy = [name for name in ('torch', 'ray', 'mlflow', 'sklearn', 'matplotlib') if name in sys.modules]\n"
        "print(set(codes), heavy, time.process_time() - started < 3)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "{2} [] True\n"
    assert done.stderr.count("\n") == len(commands)


@pytest.mark.parametrize("command", [["config"], ["tune"], ["tune", "--dry-run"]], ids=" ".join)
def test_mistakes_of_the_sweep_need_no_data_to_be_reported(
    command: list[str], tmp_path: Path, capsys: Captured
) -> None:
    file = study(tmp_path / "no-store", tmp_path, sweep={"grid": {"objective.betta": [1], "seed": [1]}})
    assert "sweep.grid: objective.betta: unknown key" in refused(capsys, *command, file)
    file = study(tmp_path / "no-store", tmp_path, sweep={"grid": {"seed": [1]}})
    assert "sweep.grid: seed: " in refused(capsys, *command, file)
