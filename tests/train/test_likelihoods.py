"""Trainings with likelihoods other than the Gaussian, from configuration to prediction."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.distributed import World
from modis_dist.evaluate.evaluation import evaluate
from modis_dist.evaluate.predictor import Predictor
from modis_dist.runtime.errors import ConfigError, DataError, Interrupted
from modis_dist.train import checkpoint
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.loop import fit
from modis_dist.train.prepare import Cohort, prepare
from modis_dist.train.stack import Member
from tests.ranks import on_ranks
from tests.train import toy
from tests.train.test_loop import StopAt

STEPS = {"poisson": ["log1p"], "negative_binomial": ["log1p"], "bernoulli": "none"}
LONG = ("optim.epochs=12", "optim.lr=0.01")
KINDS = pytest.mark.parametrize("kind", STEPS)


def run(kind: str, *overrides: str) -> Run:
    """Return the toy run with the likelihood in its first modality."""
    tree = {
        "model": toy.TREE["model"] | {"modalities": {"mirna": {"likelihood": kind}}},
        "preprocess": {"modalities": {"mirna": STEPS[kind]}},
    }
    return toy.run(*overrides, **tree)


def cohort(kind: str) -> Cohort:
    """Return the toy cohort with values in the range of the likelihood."""
    gaussian, rng = toy.cohort(), np.random.default_rng(1)
    odds = gaussian.x["mirna"]
    depth = rng.integers(50, 500, (len(odds), 1))
    counts = rng.poisson(depth * np.exp(odds) / np.exp(odds).sum(1, keepdims=True))
    values = (odds > 0) if kind == "bernoulli" else counts
    return replace(gaussian, x={**gaussian.x, "mirna": values.astype(np.float32)})


def members(kind: str, folder: Path, *overrides: str) -> list[Member]:
    """Return a stack of two members."""
    runs = [run(kind, f"seed={seed}", *overrides) for seed in range(2)]
    data = prepare(runs[0], cohort(kind), test=True)
    return [toy.member(f"t{seed}", settings, folder, prepared=data) for seed, settings in enumerate(runs)]


@KINDS
def test_a_stack_is_trained_resumed_and_used_for_prediction(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = toy.train(members(kind, tmp_path / "whole", *LONG), tmp_path / "whole")
    assert [progress.status for progress in whole] == ["done", "done"]
    for progress in whole:
        first, last = progress.history[0], progress.history[-1]
        assert last["train/reconstruction/mirna"] < first["train/reconstruction/mirna"]
        assert 0 < last["val/reconstruction_mse/mirna"] < first["val/reconstruction_mse/mirna"]

    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        toy.train(members(kind, stopped, *LONG), stopped, callbacks=Callbacks(stop=StopAt(30)))
    resumed = toy.train(members(kind, stopped, *LONG), stopped)
    assert [progress.history for progress in resumed] == [progress.history for progress in whole]

    trained = members(kind, tmp_path / "whole", *LONG)
    predictor = Predictor.open(trained[0].folder)
    errors = evaluate(predictor, trained[0].prepared.test)["translation"]["mse"]
    assert all(value > 0 for row in errors.values() for value in row.values())
    frame = pd.DataFrame(cohort(kind).x["cnv"][:5], columns=list(predictor.features("cnv")))
    translated = predictor.translate(frame, source="cnv", target="mirna").to_numpy()
    if kind == "bernoulli":
        assert ((translated > 0) & (translated < 1)).all()
    else:
        counts = np.expm1(trained[0].prepared.train.x["mirna"]).sum(1)
        np.testing.assert_allclose(translated.sum(1), np.median(counts), rtol=1e-3)


def test_reconstructions_of_counts_have_the_library_size_of_their_row(tmp_path: Path) -> None:
    trained = members("poisson", tmp_path)
    toy.train(trained, tmp_path)
    predictor, x = Predictor.open(trained[0].folder), trained[0].prepared.test.x["mirna"]
    mu, _ = predictor.encode_prepared(x, modality="mirna")
    counts = np.expm1(predictor.decode(mu, modality="mirna", like=x))
    np.testing.assert_allclose(counts.sum(1), np.expm1(x).sum(1), rtol=1e-3)


@KINDS
def test_members_of_a_stack_train_like_single_trainings(kind: str, tmp_path: Path) -> None:
    stack = tmp_path / "stack"
    together = fit(members(kind, stack), folder=stack, device=toy.CPU, dtype=torch.float64)
    alone_folder = tmp_path / "alone"
    (single,) = fit(members(kind, alone_folder)[1:], folder=alone_folder, device=toy.CPU, dtype=torch.float64)
    for row, other in zip(together[1].history, single.history, strict=True):
        assert row == pytest.approx(other, rel=1e-6)


def trained_on_ranks(world: World, folder: Path, kind: str) -> list[dict[str, float]]:
    """Return the history of a member."""
    (progress, _) = fit(members(kind, folder), folder=folder, device=toy.CPU, dtype=torch.float64, world=world)
    return progress.history


@pytest.mark.parametrize("kind", ["negative_binomial"])
def test_training_on_two_ranks_equals_training_on_one(kind: str, tmp_path: Path) -> None:
    expected = trained_on_ranks(World(), tmp_path / "one", kind)
    for history in on_ranks(2, trained_on_ranks, tmp_path / "two", kind):
        for row, other in zip(history, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("poisson", "standardise"), ("negative_binomial", "none"), ("poisson", "pca"), ("bernoulli", "minmax")],
)
def test_preprocessing_that_does_not_fit_the_likelihood_is_refused_with_both_keys(kind: str, steps: str) -> None:
    step = {"kind": "pca", "components": 3} if steps == "pca" else steps
    tree = {"model": {"modalities": {"rna": {"likelihood": kind}}}, "preprocess": {"modalities": {"rna": [step]}}}
    with pytest.raises(ConfigError) as refusal:
        parse.build(Run, tree, source="x.yaml")
    for part in ("model.modalities.rna.likelihood", kind, "preprocess.modalities.rna", steps):
        assert part in str(refusal.value)


def test_the_default_preprocessing_is_refused_for_counts() -> None:
    with pytest.raises(ConfigError, match=r"preprocess\.modalities\.rna"):
        parse.build(Run, {"model": {"modalities": {"rna": {"likelihood": "poisson"}}}}, source="x.yaml")


@pytest.mark.parametrize("steps", [["log1p"], ["log1p", {"kind": "variance_filter", "features": 3}]])
def test_counts_may_be_preprocessed_by_log1p_and_variance(steps: list[object]) -> None:
    tree = {
        "model": {"modalities": {"rna": {"likelihood": "poisson"}}},
        "preprocess": {"modalities": {"rna": steps}},
    }
    assert parse.build(Run, tree, source="x.yaml").model.modalities["rna"].likelihood == "poisson"


@pytest.mark.parametrize(
    ("kind", "value"), [("poisson", 1.5), ("negative_binomial", -1.0), ("bernoulli", 1.2), ("bernoulli", -0.1)]
)
def test_a_value_outside_the_support_of_its_likelihood_is_refused_with_sample_and_feature(
    kind: str, value: float
) -> None:
    data = cohort(kind)
    data.x["mirna"][7, 3] = value
    with pytest.raises(DataError) as refusal:
        prepare(run(kind), data)
    for part in ("mirna", "s7", "mirna3", f"{value:g}", kind, "model.modalities.mirna.likelihood"):
        assert part in str(refusal.value)


def test_the_best_model_stores_its_likelihoods(tmp_path: Path) -> None:
    trained = members("bernoulli", tmp_path)
    toy.train(trained, tmp_path)
    loaded = checkpoint.load(checkpoint.latest(trained[0].folder / "best"))
    assert loaded.state["shape"]["likelihood"] == {"mirna": "bernoulli", "cnv": "gaussian", "rppa": "gaussian"}
