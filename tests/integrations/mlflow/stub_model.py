"""A small handwritten finished run, and a predictor with the interface of ``modis_dist.load``."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

FEATURES = {"mirna": ("mir 1", "mir-2", "let_7a"), "cnv": ("TP53", "mir 1")}
CLASSES = ("BRCA", "KIRC")


def write_run(folder: Path, *, seed: int = 0) -> Path:
    """Write a run folder with the files of a finished training, some of which must not be copied."""
    checkpoint = folder / "best" / "step-00000012"
    for target in (checkpoint, folder / "last" / "step-00000020"):
        target.mkdir(parents=True)
        draw = np.random.default_rng(seed)
        save_file({m: draw.normal(size=(len(f), 2)) for m, f in FEATURES.items()}, target / "model.safetensors")
        (target / "state.json").write_text(json.dumps({"epoch": 12}))
        (target / "manifest.json").write_text("{}")
    (folder / "run.yaml").write_text("name: tiny\n")
    (folder / "journal.jsonl").write_text("")
    (folder / "predictions.csv").write_text("sample_id,predicted\nTCGA-AA-0001,BRCA\n")
    return folder


class StubPredictor:
    """A linear predictor, whose output a test can compute independently."""

    modalities = tuple(FEATURES)
    classes = CLASSES

    def __init__(self, folder: Path) -> None:
        (file,) = Path(folder).glob("best/step-*/model.safetensors")
        self._weights = load_file(file)

    def features(self, modality: str) -> tuple[str, ...]:
        return FEATURES[modality]

    def predict(self, frame: pd.DataFrame, *, modality: str) -> pd.DataFrame:
        scores = np.exp(frame[list(FEATURES[modality])].to_numpy() @ self._weights[modality])
        p = scores / scores.sum(1, keepdims=True)
        known = {"sample_id": frame["sample_id"].to_numpy()} if "sample_id" in frame else {}
        columns = {"predicted": np.array(CLASSES, dtype=object)[p.argmax(1)], "probability": p.max(1)}
        return pd.DataFrame(known | columns | {f"p({name})": p[:, k] for k, name in enumerate(CLASSES)})


@pytest.fixture
def stub_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``modis_dist.load`` open stub runs."""
    monkeypatch.setattr("modis_dist.load", lambda folder, **_: StubPredictor(folder))
