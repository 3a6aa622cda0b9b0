"""A step never synchronises with the device and computes only what its losses need."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modis_dist.distributed import ALONE
from modis_dist.objective import Rules, adversary_phase, vae_phase
from modis_dist.train.loss_log import LossLog
from tests.numeric.toy_system import KINDS, ROWS, SHAPE, batch, loader, prepared, start, weights
from tests.numeric.toy_system import step as learn

TO_HOST, FROM_HOST = "aten._local_scalar_dense.default", "aten.lift_fresh.default"


class Operations(TorchDispatchMode):
    """Counts the operations dispatched inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_watched_operations_are_those_of_reading_a_value_and_of_creating_a_tensor() -> None:
    with Operations() as done:
        assert bool(torch.tensor([1, 0]).any())
    assert {TO_HOST, FROM_HOST} <= set(done.names)


@pytest.mark.parametrize("penalty_inputs", ["x", "z"])
@pytest.mark.parametrize("losses", [("pairwise",), ("class_conditional",) * 2, KINDS], ids=["one", "two", "mixed"])
def test_after_the_first_step_nothing_is_copied_between_host_and_device(losses: Any, penalty_inputs: Any) -> None:
    r, loss_weights, rules = len(losses), weights(losses), Rules(penalty_inputs=penalty_inputs)
    model, inputs = start(range(r)).model, batch(slots=r)
    adversary_phase(model, inputs, loss_weights, rules)
    vae_phase(model, inputs, loss_weights, rules)
    with Operations() as done:
        adversary_phase(model, inputs, loss_weights, rules)
        vae_phase(model, inputs, loss_weights, rules)
    assert not {TO_HOST, FROM_HOST} & set(done.names) and len(done.names) > 20


def test_a_step_from_batch_to_loss_log_copies_nothing_between_host_and_device() -> None:
    data = prepared(dict.fromkeys(SHAPE.features, 60))
    batches = loader([data, data], range(2), batch_size=ROWS, fraction=0.25)
    log = LossLog(list(SHAPE.features), slots=2, window=100, world=ALONE)
    state, loss_weights = start(range(2)), weights(("pairwise",) * 2)

    def run_step(step: int) -> None:
        log.record(*learn(state, batches.batch(epoch=0, step=step), loss_weights, Rules()))

    run_step(0)
    with Operations() as done:
        run_step(1)
    assert not {TO_HOST, FROM_HOST} & set(done.names)
    assert done.names["aten._fused_adam_.default"] == 2, "the step did not run"


def test_the_number_of_gathers_does_not_depend_on_how_many_slots_share_data() -> None:
    data, gathers = prepared(dict.fromkeys(SHAPE.features, 60)), []
    for count in (1, 5):
        batches = loader([data] * count, range(count), batch_size=ROWS)
        batches.batch(epoch=0, step=0)
        with Operations() as done:
            batches.batch(epoch=0, step=1)
        gathers.append(done.names["aten.index.Tensor"])
    assert gathers == [len(SHAPE.features)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_predicted_only_for_the_loss_that_needs_them(kind: str) -> None:
    with Operations() as done:
        adversary_phase(start().model, batch(), weights([kind]), Rules())
        vae_phase(start().model, batch(), weights([kind]), Rules())
    assert done.names["aten.max.dim"] == (2 if kind == "class_conditional" else 0)
