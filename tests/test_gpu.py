"""The training on a CUDA device; run where there is one, skipped with the reason elsewhere."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from modis_dist.errors import Interrupted
from modis_dist.objective import Batch, Rules, Weights, adversary_phase, vae_phase
from modis_dist.train import checkpoint
from modis_dist.train.loop import Ports, fit
from tests.numeric import toy_system
from tests.train import toy
from tests.train.test_loop import StopAt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def moved(held: Batch | Weights, device: torch.device) -> Batch | Weights:
    """The same values on another device."""

    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            return tuple(part.to(device) for part in value)
        return value

    return type(held)(**{field.name: move(getattr(held, field.name)) for field in fields(held)})


def test_both_phases_give_the_same_losses_as_on_the_cpu_in_float64() -> None:
    state = toy_system.start((0, 1))
    batch, weights = toy_system.batch(replicates=2), toy_system.weights(("pairwise", "published"))
    for phase in (adversary_phase, vae_phase):
        expected = phase(state.model, batch, weights, Rules())
        found = phase(state.model.to(CUDA), moved(batch, CUDA), moved(weights, CUDA), Rules())
        state.model.to("cpu")
        for name, value in expected.parts.items():
            assert torch.allclose(found.parts[name].cpu(), value, rtol=1e-9, atol=1e-12), name


def test_a_training_resumes_to_the_bit_on_the_device(tmp_path: Path) -> None:
    def members(folder: Path) -> list:
        return [toy.member(f"t{s}", toy.run(f"seed={s}"), folder) for s in range(2)]

    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    fit(members(calm), folder=calm, device=CUDA)
    with pytest.raises(Interrupted):
        fit(members(stopped), folder=stopped, device=CUDA, ports=Ports(stop=StopAt(7)))
    fit(members(stopped), folder=stopped, device=CUDA)
    ours, theirs = (checkpoint.load(checkpoint.newest(f / "last")).tensors for f in (stopped, calm))
    for part, tensors in theirs.items():
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part
