"""The networks support autograd and ``torch.func``: second derivatives, JVPs, functional calls."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp

from modis_dist.config.run import COUNTS, Likelihood
from modis_dist.model.networks import VaeOutput
from modis_dist.train.state import Setup, TrainState
from tests.numeric.toy_system import CPU, OPTIM, SHAPE, normal

SLOTS = pytest.mark.parametrize("slots", [1, 3])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def network(name: str, slots: int, *, training: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the discriminator, or the VAE with a likelihood, of the toy system, and inputs for its ``forward``."""
    shape = replace(SHAPE, likelihood={} if name == "discriminator" else {"a": name})
    model = TrainState.start(shape, range(slots), Setup(OPTIM, CPU, torch.float64)).model.train(training)
    noise = normal(slots, 6, SHAPE.latent, seed=1)
    if name == "discriminator":
        return model.discriminator, (noise,)
    x = normal(slots, 6, SHAPE.features["a"], seed=2)
    return model.vae("a"), ((5 * x.exp()).round().log1p() if name in COUNTS else x, noise)


def outputs(result: Any) -> tuple[Tensor, ...]:
    """Return the output of a network for its inputs."""
    if isinstance(result, VaeOutput):
        likelihood = result.likelihood
        return result.mu, result.logvar, result.z, likelihood.mean, likelihood.log_prob(result.target)
    return tuple(vars(result).values())


NETWORKS = pytest.mark.parametrize("name", [*get_args(Likelihood), "discriminator"])


@NETWORKS
@SLOTS
@MODES
def test_first_and_second_derivatives_equal_finite_differences(name: str, slots: int, training: bool) -> None:
    module, inputs = network(name, slots, training=training)
    names, parameters = zip(*module.named_parameters(), strict=True)
    variables = [*(x.requires_grad_() for x in inputs), *parameters]

    def of(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, given[len(inputs) :], strict=True))
        return outputs(functional_call(module, values, given[: len(inputs)]))

    assert torch.autograd.gradcheck(of, variables, fast_mode=True)
    assert torch.autograd.gradgradcheck(of, variables, fast_mode=True)


@NETWORKS
@SLOTS
@MODES
def test_functional_gradients_of_parameters_equal_those_of_backward(name: str, slots: int, training: bool) -> None:
    module, inputs = network(name, slots, training=training)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return sum(
            (value.sin().sum() for value in outputs(functional_call(module, parameters, inputs))), torch.zeros(())
        )

    parameters = dict(module.named_parameters())
    functional = grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for (key, value), other in zip(functional.items(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it, at the first JVP
@NETWORKS
@SLOTS
@MODES
def test_jvp_and_vjp_agree(name: str, slots: int, training: bool) -> None:
    module, (x, *others) = network(name, slots, training=training)
    direction = normal(*x.shape, seed=5)

    def of(rows: Tensor) -> tuple[Tensor, ...]:
        return outputs(module(rows, *others))

    values, tangents = jvp(of, (x,), (direction,))
    again, pullback = vjp(of, x)
    cotangents = tuple(normal(*value.shape, seed=6 + n) for n, value in enumerate(values))
    torch.testing.assert_close(values, again)
    forward = sum((a * b).sum() for a, b in zip(cotangents, tangents, strict=True))
    (backward,) = pullback(cotangents)
    torch.testing.assert_close(forward, (backward * direction).sum(), rtol=1e-10, atol=1e-12)


@NETWORKS
@SLOTS
def test_a_second_backward_needs_a_retained_graph(name: str, slots: int) -> None:
    module, inputs = network(name, slots, training=True)
    loss = torch.stack([value.square().sum() for value in outputs(module(*inputs))]).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()
