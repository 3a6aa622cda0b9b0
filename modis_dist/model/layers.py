"""Layers that hold R independent replicates on a leading axis, with their derivatives written out.

Legend: r replicates, b rows, i and o input and output features. A replicate sees only its own slice, so that the
gradients of a sum over replicates are the gradients of each of them alone. Rows of a stack of one have no axis r
(``flat``): one plain product is faster than a batch of one, and views are not free.

A layer is called for its value outside training. In training ``trained`` returns its value by the statistics of the
batch and the function that takes gradients back; ``model.nodes`` makes of it a node of the graph.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from modis_dist.distributed import ALONE, World

_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_LEAKY_RELU_BACKWARD = torch.ops.aten.leaky_relu_backward.default

Gradients = Sequence[Tensor | None]  # of parameters
LinearMap = Callable[[Tensor], Tensor]
Back = Callable[..., tuple[Any, Gradients]]
"""From a gradient [*r b o] to that of the input [*r b i], where ``wanted``, and those of the layer's parameters, where
these are ``learning``; None otherwise."""


def flat(stack: Float[Tensor, "r ..."]) -> Float[Tensor, "..."]:
    """A stack of one without its axis, others as they are."""
    return stack.squeeze(0) if stack.shape[0] == 1 else stack


def times(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, or one for each replicate."""
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


class Affine(NamedTuple):
    """An affine map in the precision it is used in: ``weight`` [*r o i], ``bias`` [*r o]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """The map of each replicate applied to its own rows."""
        if x.dim() == 2:
            return torch.addmm(self.bias, x, self.weight.t())
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))

    def pull(self, gradient: Float[Tensor, "*r b o"]) -> Float[Tensor, "*r b i"]:
        """A gradient with respect to the output, as one with respect to the input."""
        return times(gradient, self.weight)

    def push(self, direction: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """A change of the input, as the change of the output."""
        return times(direction, self.weight.mT)


class StackedLinear(nn.Module):
    """R affine maps at once: weight [r, o, i], bias [r, o]."""

    def __init__(self, replicates: int, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(replicates, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(replicates, outputs, dtype=dtype))

    def affine(self, dtype: torch.dtype) -> Affine:
        """The map for rows of a type."""
        weight, bias = flat(self.weight), flat(self.bias)
        return Affine(weight, bias) if weight.dtype == dtype else Affine(weight.to(dtype), bias.to(dtype))

    def forward(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """The map applied to rows."""
        return self.affine(x.dtype)(x)

    def trained(self, x: Float[Tensor, "*r b i"]) -> tuple[Float[Tensor, "*r b o"], Back]:
        """The same in training."""
        affine = self.affine(x.dtype)

        def back(gradient: Tensor, *, wanted: bool = True, learning: bool = True) -> tuple[Tensor | None, Gradients]:
            own: Gradients = self.gradients(gradient, x) if learning else [None, None]
            return affine.pull(gradient) if wanted else None, own

        return affine(x), back

    def linearised(self, x: Float[Tensor, "*r b i"]) -> tuple[Float[Tensor, "*r b o"], LinearMap, LinearMap]:
        """The same, and its derivative both ways."""
        affine = self.affine(x.dtype)
        return affine(x), affine.pull, affine.push

    def gradients(
        self, gradient: Float[Tensor, "*r b o"], x: Float[Tensor, "*r b i"], *, of_bias: Tensor | None = None
    ) -> list[Tensor]:
        """Those of weight and bias; the latter from ``of_bias`` [*r b o], where other rows count for it."""
        of_weight, of_bias = times(gradient.mT, x), (gradient if of_bias is None else of_bias).sum(-2)
        if of_weight.dim() == 2:
            of_weight, of_bias = of_weight.unsqueeze(0), of_bias.unsqueeze(0)
        if of_weight.dtype != self.weight.dtype:
            of_weight, of_bias = of_weight.to(self.weight.dtype), of_bias.to(self.bias.dtype)
        return [of_weight, of_bias]

    @torch.no_grad()
    def initialise(self, replicate: int, generator: torch.Generator) -> None:
        """Uniform in +-1/sqrt(i), the default of ``torch.nn.Linear``, for one replicate."""
        bound = 1 / sqrt(self.weight.shape[2])
        for parameter in (self.weight, self.bias):
            drawn = torch.rand(parameter.shape[1:], generator=generator, dtype=torch.float32)
            parameter[replicate] = (2 * drawn - 1) * bound


class StackedBatchNorm(nn.Module):
    """R batch normalisations over the rows of all ranks; running statistics [r, i] as in ``torch.nn.BatchNorm1d``."""

    weight: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        replicates: int,
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
        self.weight = nn.Parameter(torch.ones(replicates, features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(replicates, features, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(replicates, features, dtype=dtype))
        self.register_buffer("running_var", torch.ones(replicates, features, dtype=dtype))

    def forward(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b i"]:
        """Normalised by the running statistics."""
        scale = self.scale()
        shift = torch.addcmul(flat(self.bias).unsqueeze(-2), flat(self.running_mean).unsqueeze(-2), scale, value=-1)
        return torch.addcmul(shift, x, scale)

    def scale(self) -> Float[Tensor, "*r 1 i"]:
        """By what an input is multiplied outside training."""
        return (flat(self.weight) * torch.rsqrt(flat(self.running_var) + self.eps)).unsqueeze(-2)

    def trained(self, x: Float[Tensor, "*r b i"]) -> tuple[Float[Tensor, "*r b i"], Back]:
        """Normalised by the statistics of the batch, which the running ones follow."""
        return self._alone(x) if self.world.alone else self._of_all_ranks(x)

    def _alone(self, x: Tensor) -> tuple[Tensor, Back]:
        rows, weight = _side_by_side(x), self.weight.view(-1)
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)
        y, *saved = torch.native_batch_norm(rows, weight, self.bias.view(-1), mean, var, True, self.momentum, self.eps)

        def back(gradient: Tensor) -> tuple[Tensor, Gradients]:
            given = _side_by_side(gradient)
            dx, *own = _BATCH_NORM_BACKWARD(given, rows, weight, mean, var, *saved, True, self.eps, [True] * 3)
            return _one_by_one(dx, like=x), [part.view_as(self.weight) for part in own]

        return _one_by_one(y, like=x), back

    def _of_all_ranks(self, x: Tensor) -> tuple[Tensor, Back]:
        """Normalised by the rows of the global batch.

        Sums are taken of x less the running mean, so that E[x^2] - E[x]^2 does not cancel.
        """
        mean, var, weight, bias = map(flat, (self.running_mean, self.running_var, self.weight, self.bias))
        moved = x.to(mean.dtype) - mean.unsqueeze(-2)
        count = moved.new_full((1,), x.shape[-2])
        sums = self.world.sum(torch.cat([moved.sum(-2).flatten(), moved.square().sum(-2).flatten(), count]))
        rows = sums[-1]
        shift, square = (sums[:-1] / rows).view(2, *mean.shape)
        variance = (square - shift.square()).clamp_min(0)
        mean.add_(self.momentum * shift)
        var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        normal = (moved - shift.unsqueeze(-2)) * scale.unsqueeze(-2)

        def back(gradient: Tensor) -> tuple[Tensor, Gradients]:
            given = gradient.to(normal.dtype)
            own = [(given * normal).sum(-2), given.sum(-2)]
            of_normal, of_one = (self.world.sum(torch.stack(own)) / rows).unsqueeze(-2)
            dx = (given - of_one - normal * of_normal) * (scale * weight).unsqueeze(-2)
            return dx.to(gradient.dtype), [part.view_as(self.weight) for part in own]

        return torch.addcmul(bias.unsqueeze(-2), normal, weight.unsqueeze(-2)).to(x.dtype), back


def _side_by_side(x: Float[Tensor, "*r b i"]) -> Float[Tensor, "b _"]:
    """Replicates as so many features more."""
    return x if x.dim() == 2 else x.transpose(0, 1).flatten(1)


def _one_by_one(x: Float[Tensor, "b _"], *, like: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b i"]:
    """The inverse of ``_side_by_side``."""
    return x if like.dim() == 2 else x.view(len(x), len(like), -1).transpose(0, 1)


class Hidden(nn.Module):
    """``Linear -> BatchNorm -> LeakyReLU``, or without the normalisation where ``eps`` is None."""

    def __init__(
        self,
        replicates: int,
        inputs: int,
        outputs: int,
        *,
        eps: float | None,
        slope: float,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.linear = StackedLinear(replicates, inputs, outputs, dtype=dtype)
        self.norm: StackedBatchNorm | None = None
        if eps is not None:
            self.norm = StackedBatchNorm(replicates, outputs, eps=eps, dtype=dtype, world=world)
        self.slope = slope

    def forward(self, x: Float[Tensor, "*r b i"]) -> Float[Tensor, "*r b o"]:
        """The activations outside training."""
        y = self.linear(x)
        return F.leaky_relu(y if self.norm is None else self.norm(y), self.slope)

    def times_slope(self, gradient: Float[Tensor, "*r b o"], h: Float[Tensor, "*r b o"]) -> Float[Tensor, "*r b o"]:
        """Times the derivative of the LeakyReLU, 1 or the slope, where the activations are ``h``."""
        found: Tensor = _LEAKY_RELU_BACKWARD(gradient, h, self.slope, True)
        return found

    def trained(self, x: Float[Tensor, "*r b i"]) -> tuple[Float[Tensor, "*r b o"], Back]:
        """The activations in training."""
        affine = self.linear.affine(x.dtype)
        y, through_norm = affine(x), None
        if self.norm is not None:
            y, through_norm = self.norm.trained(y)
        h = F.leaky_relu_(y, self.slope)
        del y

        def back(gradient: Tensor, *, wanted: bool = True, learning: bool = True) -> tuple[Tensor | None, Gradients]:
            gradient = self.times_slope(gradient, h)
            own: Gradients = []
            if through_norm is not None:
                gradient, own = through_norm(gradient)
            of_linear: Gradients = self.linear.gradients(gradient, x) if learning else [None, None]
            return affine.pull(gradient) if wanted else None, [*of_linear, *own]

        return h, back

    def linearised(self, x: Float[Tensor, "*r b i"]) -> tuple[Float[Tensor, "*r b o"], LinearMap, LinearMap]:
        """The activations outside training, and their derivative at ``x`` both ways."""
        affine = self.linear.affine(x.dtype)
        y = affine(x)
        h = F.leaky_relu(y if self.norm is None else self.norm(y), self.slope)
        scale = None if self.norm is None else self.norm.scale()

        def scaled(gradient: Tensor) -> Tensor:
            return self.times_slope(gradient if scale is None else gradient * scale, h)

        return h, lambda gradient: affine.pull(scaled(gradient)), lambda direction: scaled(affine.push(direction))


def initialise(module: nn.Module, seeds: list[int]) -> None:
    """Draw the initial weights; replicate r from a generator of its own, seeded with ``seeds[r]``."""
    layers = [layer for layer in module.modules() if isinstance(layer, StackedLinear)]
    for replicate, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            layer.initialise(replicate, generator)


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers of one replicate (the paper's table S2 counts these)."""
    return sum(parameter[0].numel() for parameter in module.parameters())
