"""The modality probe against latents whose separability is known."""

import math

import numpy as np
import pytest

from modis_dist.evaluate.probe import modality_probe

BOTH = ("logistic_regression", "knn")


def latents(rows: dict[str, int], shift: float, seed: int, *, width: int = 8) -> dict[str, np.ndarray]:
    """Unit Gaussians; modality k has mean ``k * shift`` in the first dimension."""
    draw = np.random.default_rng(seed)
    samples = {}
    for k, (name, n) in enumerate(rows.items()):
        z = draw.normal(size=(n, width)).astype(np.float32)
        z[:, 0] += k * shift
        samples[name] = z
    return samples


EQUAL = {"x": 600, "y": 600, "z": 600}


def test_the_probe_cannot_separate_aligned_latents():
    result = modality_probe(latents(EQUAL, 0, 0), latents(EQUAL, 0, 1), seed=0)
    assert result["perfect"] == pytest.approx(1 / 3)
    for name in BOTH:  # four standard errors of 1,800 coin tosses at 1/3
        assert abs(result[name] - 1 / 3) < 4 * math.sqrt(2 / 9 / 1800)


def test_the_probe_separates_distant_latents():
    result = modality_probe(latents(EQUAL, 20, 0, width=2), latents(EQUAL, 20, 1, width=2), seed=0)
    assert [result[name] for name in BOTH] == [1.0, 1.0]


def test_the_linear_probe_reaches_the_optimum_of_two_shifted_gaussians():
    rows = {"x": 2000, "y": 2000}
    result = modality_probe(latents(rows, 1, 0), latents(rows, 1, 1), seed=0)
    bayes = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))  # Phi(shift / 2)
    assert abs(result["logistic_regression"] - bayes) < 4 * math.sqrt(bayes * (1 - bayes) / 4000)
    assert bayes - 0.06 < result["knn"] < bayes + 0.02


def test_nearest_neighbours_detect_a_difference_in_spread_that_is_not_linear():
    def rings(seed: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(seed)
        return {m: (r * draw.normal(size=(500, 2))).astype(np.float32) for m, r in (("x", 0.2), ("y", 3.0))}

    result = modality_probe(rings(0), rings(1), seed=0)
    assert result["knn"] > 0.9 > 0.65 > result["logistic_regression"]


def test_chance_is_one_over_m_also_when_modalities_have_unequal_rows():
    rows = {"x": 3000, "y": 300, "z": 300}
    result = modality_probe(latents(rows, 0, 0), latents(rows, 0, 1), seed=0)
    for name in BOTH:
        assert abs(result[name] - 1 / 3) < 4 * math.sqrt(2 / 9 / 900)


def test_the_same_seed_gives_the_same_metrics_and_another_seed_draws_other_rows():
    train, test = latents(EQUAL, 0.5, 0), latents(EQUAL, 0.5, 1)
    first, again, other = (modality_probe(train, test, seed=seed, max_rows=100) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_more_than_max_rows_of_a_modality_are_used():
    full, cut = latents(EQUAL, 0.5, 0), latents(EQUAL, 0.5, 1)
    result = modality_probe(full, cut, seed=0, max_rows=50)
    for name in BOTH:  # an accuracy over 3 x 50 rows is a multiple of 1/150
        assert result[name] * 150 == pytest.approx(round(result[name] * 150))


def test_a_modality_without_rows_on_one_side_is_left_out():
    train, test = latents(EQUAL, 20, 0, width=2), latents({"x": 50, "y": 50, "z": 0}, 20, 1, width=2)
    assert modality_probe(train, test, seed=0) == {"logistic_regression": 1.0, "knn": 1.0, "perfect": 0.5}
    assert modality_probe(train, {"x": test["x"]}, seed=0)["perfect"] == 1.0


def test_fewer_rows_than_neighbours_are_enough():
    few = {"x": 3, "y": 3}
    result = modality_probe(latents(few, 20, 0, width=1), latents(few, 20, 1, width=1), seed=0)
    assert result["logistic_regression"] == 1.0
    assert result["knn"] == 0.5  # every training row is a neighbour of every test row: a tie
