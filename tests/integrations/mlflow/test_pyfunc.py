"""A saved model gives the same predictions through MLflow and contains no code, pickles or data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modis_dist.integrations.mlflow import pyfunc
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.runtime.errors import DataError
from tests.integrations.mlflow.stub_model import CLASSES, FEATURES, StubPredictor, stub_load, write_run  # noqa: F401

pytestmark = pytest.mark.usefixtures("stub_load")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def saved(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in mlflow_store.environment().items():
        monkeypatch.setenv(name, value)
    pyfunc.save(run, tmp_path / "saved")
    return tmp_path / "saved"


def frame(modality: str, rows: int = 7) -> pd.DataFrame:
    values = np.random.default_rng(1).normal(size=(rows, len(FEATURES[modality])))
    table = pd.DataFrame(values, columns=list(FEATURES[modality]))
    table.insert(0, "sample_id", [f"s{row}" for row in range(rows)])
    return table


def test_predictions_through_mlflow_equal_those_of_the_predictor_for_every_modality(saved: Path, run: Path) -> None:
    import mlflow.pyfunc

    model, direct = mlflow.pyfunc.load_model(str(saved)), StubPredictor(run)
    pd.testing.assert_frame_equal(model.predict(frame("mirna")), direct.predict(frame("mirna"), modality="mirna"))
    other = model.predict(frame("cnv"), params={"modality": "cnv"})
    pd.testing.assert_frame_equal(other, direct.predict(frame("cnv"), modality="cnv"))
    single = frame("cnv").astype({"TP53": np.float32, "mir 1": np.float32})
    np.testing.assert_allclose(
        model.predict(single, params={"modality": "cnv"})["probability"], other["probability"], rtol=1e-6
    )


def test_only_what_prediction_needs_is_stored_and_no_code_or_pickle(saved: Path) -> None:
    names = {path.name for path in saved.rglob("*") if path.is_file()}
    assert {"model.safetensors", "run.yaml", "MLmodel"} <= names
    assert not names & {"journal.jsonl", "predictions.csv"}
    assert not [name for name in names if name.endswith((".py", ".pkl", ".pickle", ".pt"))]
    assert not list(saved.rglob("last"))
    assert not any(b"TCGA-AA" in path.read_bytes() for path in saved.rglob("*") if path.is_file())


def test_the_signature_names_features_classes_and_the_default_modality(saved: Path) -> None:
    from mlflow.models import get_model_info

    signature = get_model_info(str(saved)).signature
    assert signature.inputs.input_names() == ["sample_id", "mir 1", "mir-2", "let_7a", "TP53"]
    assert signature.inputs.required_input_names() == []
    assert [column.name for column in signature.outputs] == [
        "sample_id", "predicted", "probability", *(f"p({name})" for name in CLASSES)
    ]  # fmt: skip
    assert [(p.name, p.default) for p in signature.params.params] == [("modality", "mirna")]


def test_the_digest_changes_with_the_model_and_with_nothing_else(run: Path, tmp_path: Path) -> None:
    before = pyfunc.digest(run)
    (run / "predictions.csv").write_text("other")
    assert pyfunc.digest(run) == before == pyfunc.digest(write_run(tmp_path / "same"))
    assert pyfunc.digest(write_run(tmp_path / "other", seed=1)) != before


def test_a_folder_without_a_model_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        pyfunc.digest(tmp_path)
