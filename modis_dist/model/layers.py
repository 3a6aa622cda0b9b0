"""Layers for R independent slots of a stack, on the leading axis.

Slots do not interact: the gradients of a loss summed over slots are those of each slot alone. Rows are on the last
axis, so that the gradient of a weight [r, o, i] has the weight's memory layout and one call normalises all slots
without a copy.

Legend: r slots, b rows, i and o input and output features, c features of all slots.
"""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from modis_dist.distributed import ALONE, World

MOMENTUM = 0.1  # of running statistics, as in torch.nn.BatchNorm1d


class StackedLinear(nn.Module):
    """R affine maps: weight [r, o, i], bias [r, o]."""

    def __init__(self, slots: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slots, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(slots, outputs))

    def forward(self, x: Float[Tensor, "r i b"]) -> Float[Tensor, "r o b"]:
        """Apply each slot's map to its rows."""
        return torch.baddbmm(self.bias.unsqueeze(-1), self.weight, x)

    def vjp(self, gradient: Float[Tensor, "r o b"]) -> Float[Tensor, "r i b"]:
        """Return the gradient with respect to the input, given that with respect to the output."""
        return torch.bmm(gradient.mT, self.weight).mT  # in this order the weight's gradient has the weight's strides

    @torch.no_grad()
    def initialise(self, slot: int, generator: torch.Generator) -> None:
        """Draw the parameters of one slot uniformly from +-1/sqrt(i), the default of ``torch.nn.Linear``."""
        bound = 1 / sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            uniform = torch.rand(parameter.shape[1:], generator=generator, dtype=torch.float32)
            parameter[slot] = (2 * uniform - 1) * bound


class StackedBatchNorm(nn.Module):
    """R batch normalisations over the rows of all ranks; running statistics [r, i] as in ``torch.nn.BatchNorm1d``.

    The input has the features of all slots side by side.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, slots: int, features: int, *, eps: float, world: World = ALONE) -> None:
        super().__init__()
        self.world = world
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(slots, features))
        self.bias = nn.Parameter(torch.zeros(slots, features))
        self.register_buffer("running_mean", torch.zeros(slots, features))
        self.register_buffer("running_var", torch.ones(slots, features))

    def forward(self, x: Float[Tensor, "1 c b"]) -> Float[Tensor, "1 c b"]:
        """Normalise by the statistics of the global batch in train mode, by running statistics in eval mode."""
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)
        weight, bias = self.weight.view(-1), self.bias.view(-1)
        if self.training and not self.world.alone:
            return self._over_ranks(x, mean, var, weight, bias)
        # F.batch_norm without cuDNN, which it would select on a GPU because the input has three axes.
        return torch.batch_norm(x, weight, bias, mean, var, self.training, MOMENTUM, self.eps, cudnn_enabled=False)

    def _over_ranks(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalise by the rows of all ranks.

        The running mean is subtracted first, which avoids cancellation in E[x^2] - E[x]^2.
        """
        centred = x[0].to(mean.dtype) - mean.unsqueeze(-1)
        count = centred.new_full((1,), x.shape[-1])
        sums = self.world.sum(torch.cat([centred.sum(-1), centred.square().sum(-1), count]))
        rows = sums[-1]
        shift, square = (sums[:-1] / rows).view(2, -1)
        variance = (square - shift.square()).clamp_min(0)
        mean.add_(MOMENTUM * shift.detach())
        var.lerp_((variance * rows / (rows - 1)).detach(), MOMENTUM)
        scale = torch.rsqrt(variance + self.eps) * weight
        y = torch.addcmul(bias.unsqueeze(-1), centred - shift.unsqueeze(-1), scale.unsqueeze(-1))
        return y.to(x.dtype).unsqueeze(0)

    def slope(self) -> Float[Tensor, "r i 1"]:
        """Return the derivative of the output with respect to the input in eval mode."""
        return (self.weight * torch.rsqrt(self.running_var + self.eps)).unsqueeze(-1)


class Hidden(nn.Module):
    """``Linear -> BatchNorm -> LeakyReLU``, without BatchNorm if ``eps`` is None."""

    def __init__(
        self, slots: int, inputs: int, outputs: int, *, eps: float | None, slope: float, world: World = ALONE
    ) -> None:
        super().__init__()
        self.linear = StackedLinear(slots, inputs, outputs)
        self.norm = None if eps is None else StackedBatchNorm(slots, outputs, eps=eps, world=world)
        self.slope = slope

    def forward(self, x: Float[Tensor, "r i b"]) -> Float[Tensor, "r o b"]:
        """Return the activations."""
        y = self.linear(x)
        if self.norm is None:
            return F.leaky_relu_(y, self.slope)
        slots, features, rows = y.shape
        return F.leaky_relu_(self.norm(y.view(1, slots * features, rows)), self.slope).view_as(y)

    def vjp(self, gradient: Float[Tensor, "r o b"], h: Float[Tensor, "r o b"]) -> Float[Tensor, "r i b"]:
        """Return the vector-Jacobian product in eval mode, given the activations ``h``.

        The layer is piecewise linear, so this is a product of the weight and constants, which autograd differentiates
        without a double backward.
        """
        slope = h.detach().sign().clamp_min_(self.slope)  # 1 or ``self.slope``, which is in [0, 1)
        if self.norm is not None:
            slope = slope * self.norm.slope()
        return self.linear.vjp(gradient * slope)


def initialise(module: nn.Module, seeds: list[int]) -> None:
    """Draw the initial weights of each slot r from a generator seeded with ``seeds[r]``."""
    layers = [layer for layer in module.modules() if isinstance(layer, StackedLinear)]
    for slot, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            layer.initialise(slot, generator)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters of one slot (as in the paper's table S2)."""
    return sum(parameter[0].numel() for parameter in module.parameters())
