"""Overrides, paths, messages and round trips of runs and studies."""

from pathlib import Path

import pytest

from modis_dist.config.parse import build, dump, load_run, load_study, to_tree, with_overrides, with_settings
from modis_dist.config.run import PRESETS, Optim, Run
from modis_dist.config.study import Study
from modis_dist.runtime.errors import ConfigError

MANY = """\
name: "a b"
lr: 3
data:
  store: 3
  modalities: mirna
  classes: [1, NO]
scenario:
  - unpiar
  - kind: hide_labels
    fraction: 1.5
preprocess:
  default: [minmx]
objective:
  adversarial_loss: pair wise
  penalty_weight:
optim:
  epochs: 1.5
  epoch: 3
trainer: 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text("name: x\ndata:\n  store: stores/a\noptim:\n  lr: 1e-3\nscenario: [unpair]\n")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MISTAKES = {  # key -> what its message contains
    "name": ("1 to 64", "'a b'"),
    "lr": ("unknown key", "'optim.lr'?"),
    "data.store": ("3", "'3'"),
    "data.modalities": ("'mirna'", "[mirna]"),
    "data.classes[0]": ("1", "'1'"),
    "scenario[0]": ("'unpiar'", "'unpair'?"),
    "scenario[1].fraction": ("<= 1", "1.5"),
    "preprocess.default[0]": ("'minmx'", "'minmax'?"),
    "objective.adversarial_loss": ("'class_conditional'", "'pair wise'", "'pairwise'?"),
    "objective.penalty_weight": ("null",),
    "optim.epochs": ("1.5",),
    "optim.epoch": ("unknown key", "'epochs'?"),
    "trainer": ("5",),
}


def test_all_mistakes_are_reported_at_once_each_by_its_key(file: Path) -> None:
    file.write_text(MANY)
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    by_key = {key: text for key, _, text in (problem.partition(": ") for problem in caught.value.problems)}
    assert by_key.keys() == MISTAKES.keys() and len(caught.value.problems) == len(MISTAKES)
    for key, texts in MISTAKES.items():
        assert all(text in by_key[key] for text in texts), (key, by_key[key])
    assert f"{file}: 13 " in str(caught.value) and "(1) name: " in str(caught.value)
    assert "  (13) lr: " in str(caught.value)


def test_more_than_twenty_mistakes_are_counted_and_the_first_twenty_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, {f"key{i}": 1 for i in range(500)}, source="s.yaml")
    assert "s.yaml: 500 " in str(caught.value) and "(20) " in str(caught.value) and "(21) " not in str(caught.value)
    assert "480" in str(caught.value)
    assert len(caught.value.problems) == 500


def test_user_text_in_messages_is_escaped_and_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, {"name": "\x1b[31m" + "x" * 1000, "\u202ekey\n": 1}, source="s\n.yaml")
    assert str(caught.value).isascii() and str(caught.value).isprintable() and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"data": {"store": "a", "simulate": {}}}, "data: "),
        ({"data": {"split": {"folds": 3}}}, "data.split: folds and fold "),
        ({"data": {"split": {"folds": 3, "fold": 3}}}, "data.split: fold "),
        ({"scenario": ["hide_labels"]}, "scenario[0]: "),
        ({"scenario": [{"kind": "subsample", "rows": 1, "fraction": 0.5}]}, "scenario[0]: "),
        ({"scenario": [{"kind": "cut_class", "rows": 1}]}, "scenario[0].label: "),
        ({"scenario": [{"rows": 1}]}, "scenario[0]: "),
        ({"scenario": [3]}, "scenario[0]: "),
        ({"optim": {"momentum": "fp16"}}, "optim.momentum: unknown key; known: batch_size, beta1"),
        ({"fp16": True}, "fp16: unknown key; known: data, model, name"),
        ({"trainer": {"device": "gpu"}}, "trainer.device: "),
        ({"seed": True}, "seed: "),
        ({"name": True}, "name: "),
        ({"model": {"ratios": [True, 1.0]}}, "model.ratios[0]: "),
        ({"model": {"modalities": {"a b": {}}}}, "model.modalities.a b: "),
        ({"data": {"classes": ["a"]}}, "data.classes: "),
        ({"seed": 2**63}, "seed: "),
    ],
)
def test_a_mistake_is_reported_by_its_key(tree: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Study, tree, source="s.yaml")
    assert str(caught.value).startswith(f"s.yaml: {problem}") and len(caught.value.problems) == 1
    assert "pydantic" not in str(caught.value) and "Value error" not in str(caught.value)


@pytest.mark.parametrize("gpus", [1.5, 2.01, 63.9])
def test_gpus_of_a_pack_are_an_integer_or_a_fraction_of_one(gpus: float) -> None:
    with pytest.raises(ConfigError, match=rf"^s: sweep\.resources\.gpus: .*{gpus}"):
        build(Study, {"sweep": {"resources": {"gpus": gpus}}}, source="s")
    for right in (0, 0.25, 0.5, 1, 2.0, 64):
        assert build(Study, {"sweep": {"resources": {"gpus": right}}}, source="s").sweep.resources.gpus == right


@pytest.mark.parametrize(
    "uri",
    [
        "http://alice:s3cret@tracking:5000",
        "https://s3cret@tracking",
        "HTTPS://alice:s3/cret@tracking",
        "postgresql+psycopg2://alice:s3cret@host/db",
        "mysql://alice:s3@cret@host/db",
        "postgresql://host/db?user=alice&password=s3cret",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Ds3cret",
    ],
)
def test_a_secret_in_the_tracking_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Study, {"sweep": {"mlflow": {"tracking_uri": uri}}}, source="s")
    assert str(caught.value).startswith("s: sweep.mlflow.tracking_uri: ")
    assert "s3" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://tracking.example.org/a:b/path",
        "sqlite:////data/a:b@c/mlflow.db",
        "postgresql://alice@host:5432/db",
        "mysql+pymysql://alice@host/db?read_default_file=/home/alice/.my.cnf",
        "databricks://profile",
    ],
)
def test_a_tracking_uri_without_a_secret_is_accepted(uri: str) -> None:
    assert build(Study, {"sweep": {"mlflow": {"tracking_uri": uri}}}, source="s").sweep.mlflow.tracking_uri == uri


@pytest.mark.parametrize("value", ["10", "1e1", 10.0])
def test_unambiguous_numbers_in_quotes_or_with_exponents_are_accepted(value: object) -> None:
    assert build(Run, {"optim": {"lr": "1e-3"}}, source="s").optim.lr == 0.001
    if value != "1e1":
        assert build(Run, {"optim": {"epochs": value}}, source="s").optim.epochs == 10


# --- overrides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lr=", "--set: optim.lr=: expected key=value"),
        ("optim.lr", "--set: optim.lr: expected key=value"),
        ("=1", "--set: =1: expected key=value"),
        ("optim..lr=1", "--set: optim..lr=1: expected key=value"),
        (".=1", "expected key=value"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("lr=1", "lr: unknown key; did you mean 'optim.lr'?"),
        ("optim.lr.x=1", "--set: optim.lr.x: lr "),
        ("name.x=1", "--set: name.x: name "),
        ("scenario.fraction=1", "--set: scenario.fraction: scenario "),
        ("scenario[0].fraction=1", "scenario[0]: unknown key; did you mean 'scenario'?"),
        ("optim=3", "optim: "),
        ("optim.lr=[1", "--set optim.lr=[1: line 1: not valid YAML"),
        ("optim.lr=!!python/name:os.system", "tag:yaml.org,2002:python/name:os.system"),
        ("optim.lr=fast", "optim.lr: must be a number (got 'fast')"),
        ("data.store=~nosuchuser/x", "~nosuchuser/x"),
        ('data.store="a\\0b"', '0b": line 1: '),
    ],
)
def test_an_invalid_override_is_refused_by_its_text(file: Path, override: str, problem: str) -> None:
    assert problem in refusal(file, override)


def test_a_key_set_twice_is_refused_with_all_other_wrong_overrides(file: Path) -> None:
    message = refusal(file, "optim.lr=1e-4", "optim.lr =1e-5", "seed")
    assert "--set: 2 " in message and "(1) optim.lr =1e-5: optim.lr " in message and "(2) seed: " in message


def test_overrides_are_yaml_values() -> None:
    tree = with_overrides({"a": None}, ["a.b=[1, x]", "c=NO", "d=1e-3", "e={f: 2}", " g = true", "h=a=b"])
    assert tree == {"a": {"b": [1, "x"]}, "c": "NO", "d": 0.001, "e": {"f": 2}, "g": True, "h": "a=b"}


def test_an_override_replaces_a_list(file: Path) -> None:
    study = load_study(file, ["scenario=[unpair, {kind: hide_labels, keep: 1}]", "model.ratios=[1, 0.5]"])
    assert [step.kind for step in study.scenario] == ["unpair", "hide_labels"] and study.model.ratios == (1, 0.5)


def test_overrides_do_not_modify_the_tree() -> None:
    tree = {"a": {"b": 1}}
    with_overrides(tree, ["a.b=2"])
    assert tree == {"a": {"b": 1}}


# --- paths ----------------------------------------------------------------------------------------------------


def test_a_store_is_relative_to_the_file_or_on_the_command_line_to_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", "/home/me")
    assert load_study(file).data.store == str(tmp_path / "stores/a")
    assert load_study(file, ["data.store=b"]).data.store == str(folder / "b")
    assert load_study(file, ["data={store: ../b}"]).data.store == str(tmp_path / "b")
    assert load_study(file, ["data.store=/abs"]).data.store == "/abs"
    assert load_study(file, ["data.store=~/s"]).data.store == "/home/me/s"
    assert load_run(Path("../s.yaml")).data.store == str(tmp_path / "stores/a")


def test_reference_tables_are_relative_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    file = tmp_path / "s.yaml"
    file.write_text("data: {simulate: {reference: tables}}")
    assert load_study(file).data.simulate.reference == str(tmp_path / "tables")
    assert load_study(file, ["data.simulate.reference=tmp/x"]).data.simulate.reference == str(Path("/tmp/x").resolve())


def test_a_symlink_loop_is_refused_by_its_key(file: Path, tmp_path: Path) -> None:
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "a").symlink_to(tmp_path / "stores" / "a")
    assert "data.store: " in (refused := refusal(file)) and "stores/a " in refused


def test_an_empty_path_is_refused(file: Path) -> None:
    assert "data.store: " in refusal(file, 'data.store=""')


# --- round trips ----------------------------------------------------------------------------------------------


def test_a_dumped_run_is_loaded_as_the_same_run(file: Path, tmp_path: Path) -> None:
    run = load_run(file, ["scenario=[unpair, {kind: cut_class, label: NO, rows: 3}]", "trainer.early_stopping={}"])
    written = tmp_path / "elsewhere" / "run.yaml"
    written.parent.mkdir()
    written.write_text(dump(run))
    assert load_run(written) == run


def test_a_study_is_not_a_run_but_a_run_is_a_study(file: Path) -> None:
    assert load_study(file).base() == load_run(file)
    file.write_text("sweep: {folds: 3}")
    with pytest.raises(ConfigError, match=r"sweep: .*`modis-dist tune`"):
        load_run(file)


def test_a_tree_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run(file).optim.lr = 1.0


# --- sweeps ---------------------------------------------------------------------------------------------------


def test_mistakes_in_grid_and_conditions_are_reported_with_all_others(file: Path) -> None:
    message = refusal(
        file,
        "optim.epochs=0",
        "sweep.grid={objective.betta: [1], optim.lr: [1e-3, high]}",
        "sweep.conditions={a: {model.latent: 0}}",
    )
    assert ": 4 " in message and "optim.epochs: must be >= 1" in message
    assert "sweep.grid: objective.betta: unknown key; did you mean 'beta'?" in message
    assert "sweep.grid: optim.lr: must be a number (got 'high')" in message
    assert "sweep.conditions.a: model.latent: must be >= 1 (got 0)" in message


def test_a_dotted_key_below_the_grid_or_a_condition_is_one_entry(file: Path) -> None:
    sweep = load_study(
        file, ["sweep.grid.objective.beta=[1e-4]", "sweep.conditions.a.optim.lr=1", "sweep.folds=3"]
    ).sweep
    assert sweep.grid == {"objective.beta": (1e-4,)} and sweep.conditions == {"a": {"optim.lr": 1}} and sweep.folds == 3
    assert "sweep.grid: objective.betta: unknown key" in refusal(file, "sweep.grid.objective.betta=[1]")
    replaced = with_overrides({"sweep": {"grid": {"optim.lr": [1]}}}, ["sweep.grid.optim.lr=[2]"])
    assert replaced == {"sweep": {"grid": {"optim.lr": [2]}}}


@pytest.mark.parametrize("key", ["preprocess.default", "preprocess.modalities.mirna"])
def test_none_cannot_be_combined_with_preprocessing_steps(file: Path, key: str) -> None:
    for value in ("none", "[none]"):
        assert load_study(file, [f"{key}={value}"]).preprocess.steps("mirna") == ()
    assert f"{key}: `none` " in refusal(file, f"{key}=[none, log1p]")


FAST = PRESETS["fast"]
STATED = {"optim": {"lr": 0.5, "epochs": 300}, "trainer": {"early_stopping": None}}


def with_preset(run: Run) -> dict[str, object]:
    """Return the values of the keys of a preset in a run."""
    tree = to_tree(run)
    values = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in FAST}
    patience = values["trainer.early_stopping"]
    return values | {"trainer.early_stopping": patience and {"patience": patience["patience"]}}


def test_a_preset_in_a_file_sets_keys_that_the_file_does_not_state() -> None:
    run = build(Run, {**STATED, "optim": {**STATED["optim"], "preset": "fast"}}, source="x")
    assert with_preset(run) == FAST | {"optim.lr": 0.5, "optim.epochs": 300, "trainer.early_stopping": None}
    partly = {"optim": {"preset": "fast"}, "trainer": {"early_stopping": {"min_delta": 0.01}}}
    stopping = build(Run, partly, source="x").trainer.early_stopping
    assert stopping is not None and (stopping.min_delta, stopping.patience) == (0.01, 10)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("before", [STATED, {"optim": {"preset": "fast"}}])
def test_a_preset_as_an_override_replaces_stated_keys_but_not_other_overrides(preset: str, before: dict) -> None:
    run = build(Run, with_overrides(before, [f"optim.preset={preset}", "optim.epochs=7"]), source="x")
    assert with_preset(run) == PRESETS[preset] | {"optim.epochs": 7}
    again = build(Run, with_settings(to_tree(run), {"optim.preset": "published"}, source="x"), source="x")
    assert with_preset(again) == PRESETS["published"]


def test_the_default_preset_is_published() -> None:
    assert with_preset(Run()) == PRESETS["published"]


def test_a_run_with_a_preset_is_dumped_and_loaded_unchanged() -> None:
    run = build(Run, {"optim": {"preset": "fast"}}, source="x")
    assert build(Run, to_tree(run), source="x") == run
    settings = {"optim.epochs": 3, "trainer.early_stopping": None}
    later = build(Run, with_settings(to_tree(run), settings, source="x"), source="x")
    assert with_preset(later) == FAST | settings


def test_the_description_of_the_preset_lists_its_keys() -> None:
    text = str(Optim.model_fields["preset"].description)
    assert all(f"{key} " in text for key in FAST) and "patience" in text


OLD_KEYS = {
    "objective.lambda_r": 1,
    "objective.penalty": "sum",
    "objective.penalty_on": "x",
    "objective.class_weight": 1,
    "objective.confidence": 0.9,
    "optim.schedule": "fast",
    "optim.epoch_ends": "shortest",
    "optim.labelled_share": 0.25,
    "trainer.features_in": "disk",
    "data.simulate.params": "tables",
    "sweep.search": {"kind": "optuna", "at_once": 3},
    "sweep.mlflow.uri": "sqlite:///x.db",
    "sweep.mlflow.experiment": "x",
    "preprocess.default": [{"kind": "impute", "value": "mean"}],
}


@pytest.mark.parametrize("key", OLD_KEYS)
def test_the_keys_of_earlier_versions_are_refused_by_name(key: str) -> None:
    value = OLD_KEYS[key]
    with pytest.raises(ConfigError) as caught:
        build(Study, with_settings({}, {key: value}, source="x"), source="x")
    wrong = [problem for problem in caught.value.problems if "unknown key" in problem]
    last = list(value[-1] if isinstance(value, list) else value)[-1] if isinstance(value, dict | list) else key
    assert len(wrong) == 1 and wrong[0].partition(":")[0].endswith(last)
