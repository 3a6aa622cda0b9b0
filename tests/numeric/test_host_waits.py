"""A step never waits for the device and computes only what its losses need."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modis_dist import objective
from modis_dist.objective import Rules, adversary_phase, vae_phase
from tests.numeric.toy_system import KINDS, batch, start, weights

TO_HOST, FROM_HOST = "aten._local_scalar_dense.default", "aten.lift_fresh.default"


class Operations(TorchDispatchMode):
    """Remembers the names of the operations done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_the_two_names_are_those_of_reading_a_value_and_of_making_a_tensor() -> None:
    with Operations() as done:
        assert bool(torch.tensor([1, 0]).any())
    assert {TO_HOST, FROM_HOST} <= done.names


@pytest.mark.parametrize("penalty_on", ["x", "z"])
@pytest.mark.parametrize("losses", [("pairwise",), ("class_conditional",) * 2, KINDS], ids=["one", "two", "mixed"])
def test_after_the_first_step_nothing_crosses_between_host_and_device(losses: Any, penalty_on: Any) -> None:
    r, how, rules = len(losses), weights(losses), Rules(penalty_on=penalty_on)
    model, given = start(range(r)).model, batch(replicates=r)
    adversary_phase(model, given, how, rules)
    vae_phase(model, given, how, rules)
    with Operations() as done:
        adversary_phase(model, given, how, rules)
        vae_phase(model, given, how, rules)
    assert not done.names & {TO_HOST, FROM_HOST} and len(done.names) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_guessed_only_for_the_loss_that_needs_them(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guess, calls = objective._confident, []
    monkeypatch.setattr(objective, "_confident", lambda *given: calls.append(1) or guess(*given))
    adversary_phase(start().model, batch(), weights([kind]), Rules())
    vae_phase(start().model, batch(), weights([kind]), Rules())
    assert len(calls) == (2 if kind == "class_conditional" else 0)
