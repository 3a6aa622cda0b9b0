"""The gradient penalty equals gradients of single rows through plain layers."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from modis_dist.model.networks import DiscriminatorOutput, Modis
from modis_dist.objective import Rules, adversary_phase
from tests.numeric import plain_reference as plain
from tests.numeric.toy_system import KINDS, batch, start, weights

ways = pytest.mark.parametrize(("penalty", "on"), list(product(["sum", "each"], ["x", "z"])))


@ways
def test_penalty_is_half_the_mean_square_of_the_gradients_of_single_rows(penalty: str, on: str) -> None:
    model, inputs = start([3]).model, batch(4, signs=penalty == "each")
    penalties = adversary_phase(model, inputs, weights(), Rules(penalty_outputs=penalty, penalty_inputs=on)).parts[
        "penalty"
    ]
    system = plain.PlainSystem(model)
    system.vaes.eval()
    signs = inputs.signs[0] if inputs.signs is not None else torch.ones(3, 6, 3, dtype=torch.float64)
    for m in range(3):
        squares = plain.squared_gradients(system, m, inputs.x[m][0], inputs.noise_d[0, m], signs[m], on)
        torch.testing.assert_close(penalties[0, m], plain.mean(squares) / 2, rtol=1e-10, atol=0)


@ways
def test_the_discriminator_gradient_of_the_penalty_equals_finite_differences(penalty: str, on: str) -> None:
    model, inputs = start([5]).model, batch(6, signs=penalty == "each")
    loss_weights = replace(
        weights(penalty_weight=2.0), adversarial=torch.zeros(1).double(), classification=torch.zeros(1).double()
    )
    loss_weights = replace(loss_weights, clustering=torch.zeros(1).double())
    rules = Rules(penalty_outputs=penalty, penalty_inputs=on)
    parameter = model.discriminator.modality.weight
    adversary_phase(model, inputs, loss_weights, rules).loss.sum().backward(
        inputs=list(model.discriminator.parameters())
    )
    assert parameter.grad is not None
    eps = 1e-6
    for position in [(0, 0, 0), (0, 1, 3), (0, 2, 5)]:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[position] += sign * eps
                original = parameter.clone()
            ends.append(adversary_phase(model, inputs, loss_weights, rules).total.item())
            with torch.no_grad():
                parameter.copy_(original)
                parameter[position] -= sign * eps
        expected = (ends[0] - ends[1]) / (2 * eps)
        assert parameter.grad[position].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("on", ["x", "z"])
def test_each_averaged_over_all_signs_is_the_sum_of_squared_gradients_over_logits(on: str) -> None:
    model, inputs = start([7]).model, batch(8, signs=True)
    rules = Rules(penalty_outputs="each", penalty_inputs=on)
    values = []
    for signs in product([-1.0, 1.0], repeat=3):
        same = torch.tensor(signs, dtype=torch.float64).expand(1, 3, 6, 3)
        values.append(adversary_phase(model, replace(inputs, signs=same), weights(), rules).parts["penalty"])
    system = plain.PlainSystem(model)
    system.vaes.eval()
    for m in range(3):
        expected = 0.0
        for k in range(3):
            one = torch.eye(3, dtype=torch.float64)[k].expand(6, 3)
            squares = plain.squared_gradients(system, m, inputs.x[m][0], inputs.noise_d[0, m], one, on)
            expected += plain.mean(squares).item() / 2
        assert torch.stack(values).mean(0)[0, m].item() == pytest.approx(expected, rel=1e-10)


@ways
def test_penalty_of_a_constant_critic_is_zero(penalty: str, on: str) -> None:
    model = start([1]).model
    torch.nn.init.zeros_(model.discriminator.modality.weight)
    terms = adversary_phase(
        model, batch(1, signs=penalty == "each"), weights(), Rules(penalty_outputs=penalty, penalty_inputs=on)
    )
    assert terms.parts["penalty"].eq(0).all()


def test_opposite_critics_cancel_in_sum_but_not_in_each() -> None:
    model = start([1]).model
    with torch.no_grad():
        head = model.discriminator.modality.weight
        head[:, 2] = 0
        head[:, 1] = -head[:, 0]
    terms = {
        penalty: adversary_phase(model, batch(1, signs=penalty == "each"), weights(), Rules(penalty_outputs=penalty))
        for penalty in ("sum", "each")
    }
    assert terms["sum"].parts["penalty"].max() < 1e-25
    assert terms["each"].parts["penalty"].max() > 1e-9


@ways
def test_penalty_enters_the_total_with_lambda_r_summed_over_modalities(penalty: str, on: str) -> None:
    model, inputs = start([0, 1, 2]).model, batch(2, slots=3, signs=penalty == "each")
    rules = Rules(penalty_outputs=penalty, penalty_inputs=on)
    heavy = adversary_phase(model, inputs, weights(["pairwise"] * 3, penalty_weight=[4.0, 1.0, 0.0]), rules)
    light = adversary_phase(model, inputs, weights(["pairwise"] * 3, penalty_weight=0.0), rules)
    share = heavy.parts["penalty"].sum(1) * torch.tensor([4.0, 1.0, 0.0])
    torch.testing.assert_close(heavy.total - light.total, share, rtol=1e-10, atol=1e-12)


def test_a_member_without_penalty_reports_the_same_terms_alone_and_in_a_stack() -> None:
    model, inputs = start([0, 1]).model, batch(2, slots=2)
    stacked = adversary_phase(model, inputs, weights(["pairwise"] * 2, penalty_weight=[0.0, 2.0]), Rules()).parts
    without = adversary_phase(model, inputs, weights(["pairwise"] * 2, penalty_weight=0.0), Rules()).parts
    assert list(stacked) == list(without)
    assert stacked["penalty"][0].eq(0).all()
    assert without["penalty"].eq(0).all()
    assert stacked["penalty"][1].gt(0).all()


def test_signs_must_match_the_penalty_outputs() -> None:
    model = start().model
    for penalty, signs in (("sum", True), ("each", False)):
        with pytest.raises(AssertionError, match="signs"):
            adversary_phase(model, batch(signs=signs), weights(), Rules(penalty_outputs=penalty))


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_does_not_depend_on_the_adversarial_loss(kind: str) -> None:
    model, inputs = start([1]).model, batch(1)
    penalties = [adversary_phase(model, inputs, weights([k]), Rules()).parts["penalty"] for k in (kind, "pairwise")]
    assert torch.equal(*penalties)


@pytest.mark.parametrize("slots", [1, 3])
def test_input_gradients_in_closed_form_equal_backpropagation_and_are_differentiable(slots: int) -> None:
    model = start(list(range(slots))).model
    inputs = batch(3, slots=slots)
    x, noise = inputs.x[0].requires_grad_(), inputs.noise_d[:, 0]
    z, expected, expected_output = backpropagated(model, x, noise)
    model.vaes.eval()
    with torch.no_grad():
        sampled_z, vjp = model.vaes[0].sample_with_vjp(x.detach(), noise)
    output, z_gradient = model.discriminator.with_input_gradient(sampled_z, torch.ones_like(expected_output.modality))
    gradient = vjp(z_gradient).view_as(expected)
    pairs = [(sampled_z, z), (gradient, expected), (output.h, expected_output.h), (output.label, expected_output.label)]
    for value, reference in pairs:
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)
    parameters = list(model.discriminator.parameters())
    losses = [value.square().sum() + each.modality.sin().sum() + each.label.cos().sum() + each.h.exp().sum()
              for value, each in ((gradient, output), (expected, expected_output))]  # fmt: skip
    gradients, expected_gradients = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


def backpropagated(model: Modis, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, DiscriminatorOutput]:
    """Return latents, the input gradient of the sum of logits, and the discriminator output, by double backward."""
    model.eval()
    mu, logvar = model.vaes[0].encode(x)
    z = mu + torch.exp(0.5 * logvar) * noise
    output = model.discriminator(z)
    model.train()
    (gradient,) = torch.autograd.grad(output.modality.sum(), x, create_graph=True)
    return z, gradient, output


@pytest.mark.parametrize("slots", [1, 3])
def test_gradients_in_train_mode_equal_plain_layers(slots: int) -> None:
    model = start(list(range(slots))).model
    x = batch(3, slots=slots).x[0].requires_grad_()
    mu, logvar = model.vaes[0].encode(x)
    x_hat = model.vaes[0].decode(mu).mean
    loss = (mu.sin() + logvar.cos()).sum() + x_hat.square().sum()
    gradients = torch.autograd.grad(loss, [x, *model.vaes[0].parameters()])
    for r in range(slots):
        plain_vae, rows = plain.PlainSystem(start(list(range(slots))).model, r).vaes[0], x[r].detach().requires_grad_()
        h = plain_vae.encoder(rows)
        plain_mu, plain_logvar = plain_vae.mu(h), plain_vae.logvar(h)
        loss = (plain_mu.sin() + plain_logvar.cos()).sum() + plain_vae.decoder(plain_mu).square().sum()
        expected = torch.autograd.grad(loss, [rows, *plain_vae.parameters()])
        for stacked, single in zip(gradients, expected, strict=True):
            torch.testing.assert_close(stacked[r], single, rtol=1e-9, atol=1e-11)


def test_the_encoders_of_phase_d_use_running_statistics_and_do_not_change_them() -> None:
    model, inputs = start([4]).model.train(), batch(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_training = adversary_phase(model, inputs, weights(), Rules())
    in_evaluation = adversary_phase(model.eval(), inputs, weights(), Rules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(in_training.total, in_evaluation.total)
