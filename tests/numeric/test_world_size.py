"""One, two and three ranks take the same steps as one process with the whole batch, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modis_dist.distributed import ALONE, World
from modis_dist.model.layers import StackedBatchNorm
from modis_dist.objective import Batch, Rules
from modis_dist.train.state import Setup, TrainState
from tests.devices import SINGLE_RANK
from tests.numeric.paired_loss import registered
from tests.numeric.toy_system import KINDS, OPTIM, SHAPE, batch, few, moved, step, weights
from tests.ranks import on_ranks

STEPS = 4


@dataclass(frozen=True)
class Case:
    """Settings for a few steps of the toy system."""

    losses: tuple[str, ...] = ("pairwise",)
    rules: Rules = field(default_factory=Rules)
    rows: int = 8
    labelled_from: int = 0  # rows before this one are not labelled

    def batch(self, number: int) -> Batch:
        """Return the global batch of a step."""
        signs = self.rules.penalty_outputs == "each"
        whole = batch(number, slots=len(self.losses), rows=self.rows, signs=signs)
        hidden = torch.arange(self.rows) < self.labelled_from
        return replace(whole, label=whole.label.masked_fill(hidden, -1))


CASES = {
    **{kind: Case((kind,)) for kind in KINDS},
    "penalty of each logit on x": Case(rules=Rules("mean", "each", "x")),
    "penalty on z": Case(rules=Rules("sum", "each", "z")),
    "uneven blocks": Case(rows=7),
    "three rows: no rank has more than one of a modality": Case(rows=3),
    "two rows: of three ranks each lacks a modality": Case(rows=2),
    "the first rank has no labelled row": Case(rows=9, labelled_from=5),
    "no label at all": Case(labelled_from=8),
    "pairs of rows": Case(("paired",), rows=7),
    "a stack of all losses": Case((*KINDS, "paired"), rows=7),
}


def block_of(world: World, whole: Batch) -> Batch:
    """Return a rank's part of a global batch."""
    rows = whole.label.shape[2]
    return replace(whole, x=tuple(x[:, world.block(m, rows)] for m, x in enumerate(whole.x)))


@registered()
def run(
    world: World, case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all parameters and statistics after some steps, and the terms of the last step."""
    seeds, place = range(len(case.losses)), torch.device(device)
    state = TrainState.start(SHAPE, seeds, Setup(OPTIM, place, dtype, world))
    loss_weights = moved(weights(case.losses, dtype=dtype), place)
    for number in range(STEPS):
        inputs = moved(cast(block_of(world, case.batch(number)), dtype), place)
        phases = step(state, inputs, loss_weights, case.rules)
    terms = {name: world.sum(value) for phase in phases for name, value in phase.parts.items()}
    terms |= {f"total {number}": world.sum(torch.as_tensor(phase.total)) for number, phase in enumerate(phases)}
    after = {name: tensor.clone() for name, tensor in state.model_tensors().items()}
    return {name: t.cpu() for name, t in after.items()}, {name: t.cpu() for name, t in terms.items()}


def cast(whole: Batch, dtype: torch.dtype) -> Batch:
    """Return the same batch in another precision."""
    signs = None if whole.signs is None else whole.signs.to(dtype)
    x = tuple(part.to(dtype) for part in whole.x)
    return Batch(x, whole.label, whole.sample, whole.noise_d.to(dtype), whole.noise_g.to(dtype), signs)


def all_cases(world: World, folder: Path, device: str) -> dict[str, Any]:
    del folder
    return {name: run(world, case, device=device) for name, case in CASES.items()}


def run_with_per_rank_statistics(world: World, folder: Path) -> dict[str, Tensor]:
    del folder
    forward = StackedBatchNorm.forward

    def normalise_per_rank(layer: StackedBatchNorm, x: Tensor) -> Tensor:
        """Normalise as ``torch.nn.BatchNorm1d`` under DDP does."""
        layer.world = ALONE
        return forward(layer, x)

    StackedBatchNorm.forward = normalise_per_rank  # type: ignore[method-assign]
    return run(world, CASES["uneven blocks"])[0]


@pytest.fixture(scope="module", params=[*SINGLE_RANK, (2, "cpu"), (3, "cpu")])
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """Return the results of every rank in all cases; a world of one rank also uses a process group."""
    size, device = request.param
    yield on_ranks(size, all_cases, tmp_path_factory.mktemp("world"), device, device=device)


@pytest.mark.parametrize("name", CASES)
def test_steps_do_not_depend_on_the_number_of_ranks(name: str, worlds: list[dict[str, Any]]) -> None:
    expected, terms = run(ALONE, CASES[name])
    for rank_tensors, rank_terms in (rank[name] for rank in worlds):
        for key, tensor in expected.items():
            torch.testing.assert_close(
                rank_tensors[key], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}"
            )
        for key, value in terms.items():
            torch.testing.assert_close(rank_terms[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_are_bit_identical(name: str, worlds: list[dict[str, Any]]) -> None:
    first = worlds[0][name][0]
    assert all(torch.equal(rank[name][0][key], tensor) for rank in worlds[1:] for key, tensor in first.items())


def test_steps_differ_if_every_rank_normalises_by_its_own_rows(tmp_path: Path) -> None:
    expected = run(ALONE, CASES["uneven blocks"])[0]
    actual = on_ranks(2, run_with_per_rank_statistics, tmp_path)[0]
    assert max(float((actual[key] - tensor).abs().max()) for key, tensor in expected.items()) > 1e-4


@few
@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 5))
def test_blocks_of_all_ranks_cover_the_batch_and_their_sizes_differ_by_at_most_one(
    size: int, rows: int, m: int
) -> None:
    for modality in range(m):
        blocks = [range(rows)[World(rank, size).block(modality, rows)] for rank in range(size)]
        assert sorted(row for block in blocks for row in block) == list(range(rows))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_the_ranks_with_longer_blocks_differ_between_modalities() -> None:
    lengths = [[len(range(7)[World(rank, 3).block(m, 7)]) for m in range(3)] for rank in range(3)]
    assert [sum(of_rank) for of_rank in lengths] == [7, 7, 7]
