"""Files of a training: they read back as written; damaged, incomplete and old ones are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modis_dist.evaluate.baseline import logistic_regression
from modis_dist.evaluate.results import (
    HISTORY,
    INTERIM_RESULT,
    RESULT,
    Result,
    read_history,
    read_interim_result,
    read_result,
    write_history,
    write_result,
)
from modis_dist.metrics import ClassPredictions, classification, translation
from modis_dist.report.study_results import SUMMARY, read_summary, write_summary
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import write_json
from tests import toy_results


def evaluated() -> Result:
    """A result with every optional part."""
    codes = np.array([0, 1, 1, -1])
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    ids = {"m": np.array(list("abcd"), object)}
    classes = classification({"m": ClassPredictions(codes, codes * 0)}, classes="ab", absent_pairs=[("b", "m")])
    errors = translation({"m": x}, ids, lambda _a, _b, rows: x[rows])
    probe = {"logistic_regression": 1.0, "knn": 1.0, "perfect": 1.0}
    baseline = logistic_regression({"m": (x, codes)}, {"m": (x, codes)}, classes="ab")
    evaluation = {"classification": classes, "translation": errors, "probe": probe}
    return toy_results.result("t", evaluation=evaluation, baseline=baseline)


def test_results_and_histories_read_back_as_written(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None and read_interim_result(tmp_path) is None and read_summary(tmp_path) is None
    write_result(tmp_path, evaluated())
    assert read_result(tmp_path) == evaluated() and read_interim_result(tmp_path) is None
    write_json(tmp_path / INTERIM_RESULT, toy_results.result("t", status="running"))
    assert read_interim_result(tmp_path) == toy_results.result("t", status="running")
    write_history(tmp_path, [{"epoch": 1, "train/kl": 0.5, "val/nmi": float("nan")}])
    assert read_history(tmp_path) == [{"epoch": 1, "train/kl": 0.5, "val/nmi": None}]
    write_summary(tmp_path, toy_results.summary(seconds=2.5))
    assert read_summary(tmp_path) == toy_results.summary(seconds=2.5)


def rewrite(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "removed"}))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"epochs": "removed"}, "epochs"),
        ({"epochs": "four"}, "epochs"),
        ({"status": "ready"}, "status"),
        ({"evaluation": {"translation": {}}}, "evaluation.classification"),
    ],
)
def test_an_incomplete_result_is_refused_with_its_file_and_key(
    tmp_path: Path, changed: dict[str, Any], key: str
) -> None:
    write_result(tmp_path, evaluated())
    rewrite(tmp_path / RESULT, **changed)
    with pytest.raises(DataError) as refused:
        read_result(tmp_path)
    assert str(tmp_path / RESULT) in str(refused.value) and f"({key}: " in str(refused.value)


@pytest.mark.parametrize("content", [b"", b'{"version": 2, "tri', b"[]", b"\xff"])
@pytest.mark.parametrize("name", [RESULT, INTERIM_RESULT, HISTORY, SUMMARY])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    readers = {RESULT: read_result, INTERIM_RESULT: read_interim_result, HISTORY: read_history, SUMMARY: read_summary}
    (tmp_path / name).write_bytes(content)
    if (name, content) == (HISTORY, b"[]"):
        assert read_history(tmp_path) == []  # of a training that failed in its first epoch
        return
    with pytest.raises(DataError) as refused:
        readers[name](tmp_path)
    assert str(tmp_path / name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("version", ["removed", 1, 3])
def test_another_format_version_is_refused_and_named(tmp_path: Path, version: object) -> None:
    write_result(tmp_path, evaluated())
    write_summary(tmp_path, toy_results.summary())
    for name, read in ((RESULT, read_result), (SUMMARY, read_summary)):
        rewrite(tmp_path / name, version=version)
        with pytest.raises(DataError) as refused:
            read(tmp_path)
        number = 1 if version == "removed" else version
        assert f"version {number}" in str(refused.value) and str(tmp_path / name) in str(refused.value)


def test_a_history_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=HISTORY):
        read_history(tmp_path)
