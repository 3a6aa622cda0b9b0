"""The two phases of a step: trained parameters, batch statistics, and five steps against plain layers and Adam."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from modis_dist.model.layers import StackedBatchNorm, StackedLinear, initialise
from modis_dist.objective import Rules, adversary_phase, frozen, vae_phase
from tests.numeric import plain_reference as plain
from tests.numeric.paired_loss import registered
from tests.numeric.toy_system import KINDS, OPTIM, SHAPE, batch, normal, start, step, weights

RULES = [
    Rules(kl_reduction=kl, penalty_outputs=penalty, penalty_inputs=on)
    for kl, penalty, on in [("sum", "sum", "x"), ("mean", "each", "x"), ("sum", "each", "z"), ("mean", "sum", "z")]
]


# --- trained parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_adversary_phase_gives_gradients_to_the_discriminator_only_and_updates_no_statistics(rules: Rules) -> None:
    model = start().model
    before = {name: tensor.clone() for name, tensor in model.vaes.state_dict().items()}
    adversary_phase(model, batch(signs=rules.penalty_outputs == "each"), weights(), rules).loss.sum().backward()
    assert all(p.grad is None for p in model.vaes.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.discriminator.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vaes.state_dict().items())


def test_vae_phase_gives_gradients_to_the_vaes_only_and_updates_their_statistics() -> None:
    model = start().model
    norms = [layer for layer in model.vaes.modules() if isinstance(layer, StackedBatchNorm)]
    vae_phase(model, batch(), weights(), Rules()).loss.sum().backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert all(p.grad is not None for p in model.vaes.parameters())
    assert norms
    assert all(layer.running_mean.any() and (layer.running_var != 1).all() for layer in norms)


def test_both_phases_restore_train_mode_and_requires_grad() -> None:
    model = start().model
    adversary_phase(model, batch(), weights(), Rules())
    vae_phase(model, batch(), weights(), Rules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), frozen(model.sides["vaes"]):
        assert not any(p.requires_grad for p in model.vaes.parameters())
        assert not any(m.training for m in model.modules() if isinstance(m, StackedBatchNorm))
        raise ZeroDivisionError
    assert all(p.requires_grad for p in model.parameters())


def test_adversary_phase_encodes_with_running_statistics_and_vae_phase_with_those_of_the_batch() -> None:
    model, inputs = start([3]).model, batch(5)
    for layer in model.modules():
        if isinstance(layer, StackedBatchNorm):
            layer.running_mean += 0.5
            layer.running_var *= 3
    system, loss_weights = plain.PlainSystem(model), weights()
    terms = adversary_phase(model, inputs, loss_weights, Rules())
    torch.testing.assert_close(terms.total[0], plain.adversary_loss(system, inputs, loss_weights, Rules()))
    terms = vae_phase(model, inputs, loss_weights, Rules())
    torch.testing.assert_close(terms.total[0], plain.vae_loss(system, inputs, loss_weights, Rules()))


def test_total_of_each_phase_is_the_weighted_sum_of_its_parts() -> None:
    model, inputs, loss_weights = start([3]).model, batch(5), weights(["cross_entropy"])
    d = adversary_phase(model, inputs, loss_weights, Rules())
    g = vae_phase(model, inputs, loss_weights, Rules())
    sums = {name: part.sum() for name, part in (d.parts | g.parts).items()}
    total_d = 0.7 * sums["adversarial_d"] + 1.3 * sums["class_d"] + 0.9 * sums["clustering_d"] + 3 * sums["penalty"]
    total_g = sums["reconstruction"] + 0.02 * sums["kl"] + 0.7 * sums["adversarial_g"]
    total_g = total_g + 1.3 * sums["class_g"] + 0.9 * sums["clustering_g"]
    torch.testing.assert_close(d.total, total_d.unsqueeze(0))
    torch.testing.assert_close(g.total, total_g.unsqueeze(0))
    assert {name for name, part in (d.parts | g.parts).items() if part.shape == (1, 3)} == {
        "class_d", "clustering_d", "penalty", "reconstruction", "kl", "class_g", "clustering_g",
    }  # fmt: skip


def test_kl_mean_is_kl_sum_divided_by_rows() -> None:
    model, inputs = start([3]).model, batch(5)
    kl_terms = {kl: vae_phase(model, inputs, weights(), Rules(kl_reduction=kl)).parts["kl"] for kl in ("sum", "mean")}
    torch.testing.assert_close(kl_terms["mean"] * 6, kl_terms["sum"])


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_rows_within_a_batch_does_not_matter(kind: str) -> None:
    model, inputs = start([3]).model, batch(5, signs=True)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    moved = replace(
        inputs,
        x=tuple(x[:, order] for x in inputs.x),
        **{name: getattr(inputs, name)[:, :, order] for name in ("label", "noise_d", "noise_g", "signs")},
    )
    rules = Rules(penalty_outputs="each")
    for phase in (adversary_phase, vae_phase):
        totals = [phase(model, rows, weights([kind]), rules).total for rows in (inputs, moved)]
        torch.testing.assert_close(*totals, rtol=1e-12, atol=1e-12)


# --- layers -------------------------------------------------------------------------------------------------


def normalised(layer: StackedBatchNorm, x: Tensor) -> Tensor:
    """Pass rows [r, b, i] through a layer that takes all slots side by side."""
    return layer(x.mT.flatten(0, 1).unsqueeze(0)).view(x.mT.shape).mT


@pytest.mark.parametrize("slots", [1, 3])
def test_batch_norm_equals_torch_over_several_steps_and_then_in_eval_mode(slots: int) -> None:
    stacked = StackedBatchNorm(slots, 4, eps=0.8).double()
    torch_norms = [torch.nn.BatchNorm1d(4, eps=0.8, momentum=0.1, dtype=torch.float64) for _ in range(slots)]
    with torch.no_grad():
        for r, plain_norm in enumerate(torch_norms):
            plain_norm.weight.copy_(normal(4, seed=r))
            plain_norm.bias.copy_(normal(4, seed=r + 50))
            stacked.weight[r], stacked.bias[r] = plain_norm.weight, plain_norm.bias
    for number in range(5):
        x = 3 * normal(slots, 6, 4, seed=number) + 1
        expected = torch.stack([norm(rows) for norm, rows in zip(torch_norms, x, strict=True)])
        torch.testing.assert_close(normalised(stacked, x), expected, rtol=1e-12, atol=1e-12)
        for name in ("running_mean", "running_var"):
            expected = torch.stack([getattr(norm, name) for norm in torch_norms])
            torch.testing.assert_close(getattr(stacked, name), expected, rtol=1e-12, atol=1e-12)
    expected = torch.stack([norm.eval()(rows) for norm, rows in zip(torch_norms, x, strict=True)])
    stacked.eval()
    torch.testing.assert_close(normalised(stacked, x), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_initial_weights_are_uniform_within_the_bound_of_torch_linear_and_depend_on_the_seed_only() -> None:
    layers = torch.nn.ModuleList([StackedLinear(3, 400, 50), StackedLinear(3, 50, 2)])
    initialise(layers, [11, 12, 11])
    first = layers[0]
    assert torch.equal(first.weight[0], first.weight[2])
    assert not torch.equal(first.weight[0], first.weight[1])
    torch.manual_seed(0)
    torch_linear = torch.nn.Linear(400, 50)
    for parameter, reference in ((first.weight, torch_linear.weight), (first.bias, torch_linear.bias)):
        assert parameter.abs().max() <= 1 / 20
        assert parameter.abs().max() == pytest.approx(float(reference.abs().max()), rel=0.1)
        assert parameter.mean().abs() < 0.005
    assert first.weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    single = torch.nn.ModuleList([StackedLinear(1, 400, 50), StackedLinear(1, 50, 2)])
    initialise(single, [12])
    assert all(
        torch.equal(slot[0], stack[1]) for slot, stack in zip(single.parameters(), layers.parameters(), strict=True)
    )


# --- five steps against the slow reference ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rules"), [*zip(KINDS, RULES, strict=True), ("pairwise", RULES[0]), ("paired", RULES[0])]
)
@registered()
def test_five_steps_equal_plain_layers_and_adam(kind: str, rules: Rules) -> None:
    state, loss_weights = start([9]), weights([kind], penalty_weight=2.5)
    system = plain.PlainSystem(state.model)
    adam = [
        torch.optim.Adam(system.vaes.parameters(), lr=OPTIM.lr, betas=(0.5, 0.999)),
        torch.optim.Adam(system.discriminator.parameters(), lr=OPTIM.lr_discriminator, betas=(0.5, 0.999)),
    ]
    for number in range(5):
        inputs = batch(number, signs=rules.penalty_outputs == "each")
        adversary, vae = step(state, inputs, loss_weights, rules)
        for phase, optimiser, total in (
            (plain.adversary_loss, adam[1], adversary.total),
            (plain.vae_loss, adam[0], vae.total),
        ):
            loss = phase(system, inputs, loss_weights, rules)
            torch.testing.assert_close(total[0], loss, rtol=1e-10, atol=1e-10)
            for each in adam:
                each.zero_grad()
            loss.backward()
            optimiser.step()
        assert system.largest_difference(state.model) < 1e-10
    assert plain.PlainSystem(start([9]).model).largest_difference(state.model) > 1e-3, "no parameter changed"


def test_reference_covers_every_kind_of_loss_and_penalty() -> None:
    assert {(rules.penalty_outputs, rules.penalty_inputs) for rules in RULES} == set(
        product(["sum", "each"], ["x", "z"])
    )
    assert len(KINDS) == len(RULES)
    assert SHAPE.eps == 0.8
