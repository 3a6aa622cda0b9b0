"""Layers that hold R independent slots of a stack on a leading axis.

Legend: r slots, b rows, i and o input and output features. A slot sees only its own slice, so that the gradients of a
sum over slots are the gradients of each of them alone. Rows of a stack of one have no axis r (``flat``): one plain
product is faster than a batch of one.
"""

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from modis_dist.distributed import ALONE, World


def flat(stack: Float[Tensor, "r ..."]) -> Float[Tensor, "..."]:
    """A stack of one without its axis; other stacks unchanged."""
    return stack.squeeze(0) if stack.shape[0] == 1 else stack


def unflat(rows: Float[Tensor, "*r b i"]) -> Float[Tensor, "r b i"]:
    """The inverse of ``flat`` for rows."""
    return rows.unsqueeze(0) if rows.dim() == 2 else rows


class StackedLinear(nn.Module):
    """R affine maps: weight [r, o, i], bias [r, o]."""

    def __init__(self, slots: int, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(slots, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(slots, outputs, dtype=dtype))

    def forward(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """Map the rows of each slot."""
        weight, bias = flat(self.weight), flat(self.bias)
        if x.dim() == 2:
            return F.linear(x, weight, bias)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    def vjp(self, gradient: Float[Tensor, "*r b o"]) -> Float[Tensor, "*r b i"]:
        """Vector-Jacobian product: a gradient with respect to the output as one with respect to the input."""
        return gradient @ flat(self.weight)

    @torch.no_grad()
    def initialise(self, slot: int, generator: torch.Generator) -> None:
        """Uniform in +-1/sqrt(i), the default of ``torch.nn.Linear``, for one slot."""
        bound = 1 / sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            uniform = torch.rand(parameter.shape[1:], generator=generator, dtype=torch.float32)
            parameter[slot] = (2 * uniform - 1) * bound


class StackedBatchNorm(nn.Module):
    """R batch normalisations over the rows of all ranks; running statistics [r, i] as in ``torch.nn.BatchNorm1d``.

    Slots lie side by side, as further features: rows are [b, r * i].
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        slots: int,
        features: int,
        *,
        eps: float,
        momentum: float = 0.1,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.world = world
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(slots, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(slots, features, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(slots, features, dtype=dtype))
        self.register_buffer("running_var", torch.ones(slots, features, dtype=dtype))

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """In training normalise by the statistics of the global batch, else by the running ones."""
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)
        weight, bias = self.weight.view(-1), self.bias.view(-1)
        if self.training and not self.world.alone:
            return self._over_ranks(x, mean, var, weight, bias)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def _over_ranks(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalise by the rows of all ranks.

        Sums are taken of x less the running mean, so that E[x^2] - E[x]^2 does not cancel.
        """
        centred = x.to(mean.dtype) - mean
        count = centred.new_full((1,), len(x))
        sums = self.world.sum(torch.cat([centred.sum(0), centred.square().sum(0), count]))
        rows = sums[-1]
        shift, square = (sums[:-1] / rows).view(2, -1)
        variance = (square - shift.square()).clamp_min(0)
        mean.add_(self.momentum * shift.detach())
        var.lerp_((variance * rows / (rows - 1)).detach(), self.momentum)
        scale = torch.rsqrt(variance + self.eps) * weight
        return torch.addcmul(bias, centred - shift, scale).to(x.dtype)

    def slope(self) -> Float[Tensor, " c"]:
        """Derivative of the output by the input outside training."""
        return (self.weight * torch.rsqrt(self.running_var + self.eps)).view(-1)


def side_by_side(x: Float[Tensor, "*r b i"]) -> Float[Tensor, "b c"]:
    """Slots as further features."""
    return x if x.dim() == 2 else x.transpose(0, 1).flatten(1)


def stacked(x: Float[Tensor, "b c"], *, like: Float[Tensor, "*r b _"]) -> Float[Tensor, "*r b i"]:
    """The inverse of ``side_by_side``."""
    return x if like.dim() == 2 else x.view(len(x), len(like), -1).transpose(0, 1)


class Hidden(nn.Module):
    """``Linear -> BatchNorm -> LeakyReLU``, or without the normalisation where ``eps`` is None."""

    def __init__(
        self,
        slots: int,
        inputs: int,
        outputs: int,
        *,
        eps: float | None,
        slope: float,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.linear = StackedLinear(slots, inputs, outputs, dtype=dtype)
        self.norm: StackedBatchNorm | None = None
        if eps is not None:
            self.norm = StackedBatchNorm(slots, outputs, eps=eps, dtype=dtype, world=world)
        self.slope = slope

    def forward(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """The activations."""
        y = self.linear(x)
        if self.norm is None:
            return F.leaky_relu_(y, self.slope)
        return stacked(F.leaky_relu_(self.norm(side_by_side(y)), self.slope), like=y)

    def vjp(self, gradient: Float[Tensor, "*r b o"], h: Float[Tensor, "*r b o"]) -> Float[Tensor, "*r b i"]:
        """Vector-Jacobian product outside training, where the activations are ``h``.

        The layer is piecewise linear, so this is a product with constants and the weight, which autograd
        differentiates once.
        """
        slope = h.detach().sign().clamp_min_(self.slope)  # 1 or the slope, as ``self.slope`` is within [0, 1)
        if self.norm is not None:
            slope = slope * flat(self.norm.slope().view_as(self.norm.weight)).unsqueeze(-2)
        return self.linear.vjp(gradient * slope)


def initialise(module: nn.Module, seeds: list[int]) -> None:
    """Draw the initial weights of slot r with a generator seeded with ``seeds[r]``."""
    layers = [layer for layer in module.modules() if isinstance(layer, StackedLinear)]
    for slot, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            layer.initialise(slot, generator)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters of one slot (the paper's table S2 counts these)."""
    return sum(parameter[0].numel() for parameter in module.parameters())
