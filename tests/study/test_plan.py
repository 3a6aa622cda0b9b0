"""Plan of a study before training: sizes of its networks, and refusals because of the data."""

from pathlib import Path

import pytest

from modis_dist.planning.timing import seconds_per_multiplication
from modis_dist.runtime.errors import DataError
from modis_dist.study.plan import Plan, plan
from modis_dist.train import prepare
from tests.integrations.slurm.toy_submission import study
from tests.study.toy_study import write_store

PCA = "preprocess.default=[standardise, {kind: pca, components: 3}, standardise]"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store")


def planned(store: Path, out: Path, *overrides: str) -> Plan:
    return plan(study(store, *overrides), out=out, slots=1, source="study.yaml")


def test_a_plan_fits_no_principal_components_but_knows_their_number_and_size(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sklearn.decomposition.PCA.fit", lambda *_: pytest.fail("they were learnt"))
    study_plan = planned(store, tmp_path, PCA)
    assert {width for shape in study_plan.shapes.values() for width in shape.features.values()} == {3}
    data = next(iter(study_plan.data.values()))
    assert data.multiplications > 0 and data.total_seconds(0.0) == data.seconds
    assert data.total_seconds(seconds_per_multiplication()) > data.seconds


def test_the_sizes_of_a_plan_equal_those_of_the_prepared_data(store: Path, tmp_path: Path) -> None:
    for steps in (PCA, "preprocess.default=[{kind: variance_filter, features: 4}, {kind: pca, components: 4}]"):
        study_plan = planned(store, tmp_path, steps)
        trial = study_plan.manifest.trials[0]
        prepared = prepare.prepare(trial.run, prepare.load_cohort(study_plan.store, trial.run.data, storage="memory"))
        widths = {modality: len(pipeline.features_out) for modality, pipeline in prepared.pipelines.items()}
        assert study_plan.shapes[trial.id].features == widths


REFUSED = {
    "preprocess.default=[{kind: pca, components: 999}]": "pca: components is 999",
    "preprocess.default=[{kind: pca, components: 3}, {kind: variance_filter, features: 4}]": "variance_filter: ",
    "preprocess.default=[{kind: pca, components: 3}, {kind: pca, components: 4}]": "pca: components is 4",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_plan_refuses_data_that_cannot_be_prepared(setting: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=REFUSED[setting]):
        planned(store, tmp_path, setting)
