"""What a study comes to before anything is trained: the sizes of its networks, and what the data refuse."""

from pathlib import Path

import pytest

from modis_dist.data import preprocess
from modis_dist.planning.probe import seconds_per_multiplication
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


def test_a_plan_learns_no_principal_components_and_knows_their_number_and_about_what_they_take(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_principal_components", lambda *_: pytest.fail("they were learnt"))
    found = planned(store, tmp_path, PCA)
    assert {width for shape in found.shapes.values() for width in shape.features.values()} == {3}
    data = next(iter(found.data.values()))
    assert data.left_out > 0 and data.takes(0.0) == data.seconds
    assert data.takes(seconds_per_multiplication()) > data.seconds


def test_the_sizes_of_a_plan_are_those_that_preparing_leads_to(store: Path, tmp_path: Path) -> None:
    for steps in (PCA, "preprocess.default=[{kind: variance, features: 4}, {kind: pca, components: 4}]"):
        found = planned(store, tmp_path, steps)
        trial = found.manifest.trials[0]
        made = prepare.prepare(trial.run, prepare.load_cohort(found.store, trial.run.data, place="memory"))
        widths = {modality: len(pipeline.features_out) for modality, pipeline in made.pipelines.items()}
        assert found.shapes[trial.id].features == widths


REFUSED = {
    "preprocess.default=[{kind: pca, components: 999}]": "components at most, not 999",
    "preprocess.default=[{kind: pca, components: 3}, {kind: variance, features: 4}]": "cannot keep 4 of 3 features",
    "preprocess.default=[{kind: pca, components: 3}, {kind: pca, components: 4}]": "gives 3 components at most",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_preparing_would_refuse_a_plan_refuses(setting: str, store: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=REFUSED[setting]):
        planned(store, tmp_path, setting)
