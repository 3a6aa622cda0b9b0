"""Layers that hold R independent replicates on a leading axis.

Legend: r replicates, b rows, i and o input and output features. A replicate sees only its own slice, so that the
gradients of a sum over replicates are the gradients of each of them alone.

Layers can also be evaluated with their derivative as a function (``with_pullback``): rows are independent then, for
normalisation uses the running statistics, and each layer is linear but for the sign of its activations. What is
computed from the derivative is differentiated once more like any other value, by ordinary backpropagation.
"""

from collections.abc import Callable, Iterable
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from modis_dist.world import ALONE, World

Pullback = Callable[[Tensor], Tensor]  # gradients with respect to outputs [r b o] -> with respect to inputs [r b i]


class StackedLinear(nn.Module):
    """R affine maps at once: weight [r, o, i], bias [r, o]."""

    def __init__(self, replicates: int, inputs: int, outputs: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(replicates, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(replicates, outputs, dtype=dtype))

    def forward(self, x: Float[Tensor, "r b i"]) -> Float[Tensor, "r b o"]:
        """The map of each replicate applied to its own rows."""
        if len(self.weight) == 1:  # one plain product: faster than a batch of one
            # squeeze, not [0], whose gradient would be copied into zeros of the whole size.
            return F.linear(x.squeeze(0), self.weight.squeeze(0), self.bias.squeeze(0)).unsqueeze(0)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))

    def pullback(self, gradient: Float[Tensor, "r b o"]) -> Float[Tensor, "r b i"]:
        """Its gradient with respect to the input, given the one with respect to the output."""
        if len(self.weight) == 1:
            return (gradient.squeeze(0) @ self.weight.squeeze(0)).unsqueeze(0)
        return torch.bmm(gradient, self.weight)

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

    def forward(self, x: Float[Tensor, "r b i"]) -> Float[Tensor, "r b i"]:
        """Normalised by the batch in training, by the running statistics otherwise."""
        if not self.training:
            return self.evaluated(x)
        if not self.world.alone:
            return self._of_all_ranks(x)
        replicates, rows, features = x.shape
        flat = x.transpose(0, 1).reshape(rows, replicates * features)
        normal = F.batch_norm(
            flat,
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.reshape(-1),
            self.bias.reshape(-1),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        return normal.view(rows, replicates, features).transpose(0, 1)

    def evaluated(self, x: Float[Tensor, "r b i"]) -> Float[Tensor, "r b i"]:
        """Normalised by the running statistics."""
        scale = self.scale()
        return torch.addcmul((self.bias - self.running_mean * scale).unsqueeze(1), x, scale.unsqueeze(1))

    def scale(self) -> Float[Tensor, "r i"]:
        """By what an input is multiplied outside training."""
        return self.weight * torch.rsqrt(self.running_var + self.eps)

    def _of_all_ranks(self, x: Float[Tensor, "r b i"]) -> Float[Tensor, "r b i"]:
        """Normalised by the rows of the global batch; differentiable once, which is all that phase G asks for.

        Sums are taken of x less the running mean, so that E[x^2] - E[x]^2 does not cancel.
        """
        shift = self.running_mean.unsqueeze(1)
        moved = x.to(shift.dtype) - shift
        count = moved.new_full((1,), x.shape[1])
        sums = self.world.sum(torch.cat([moved.sum(1).flatten(), moved.square().sum(1).flatten(), count]))
        rows = sums[-1].detach()
        mean, square = (sums[:-1] / rows).view(2, *self.running_mean.shape)
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean += self.momentum * mean
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.unsqueeze(1), moved - mean.unsqueeze(1), scale.unsqueeze(1)).to(x.dtype)


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
        self.norm: nn.Module = nn.Identity()
        if eps is not None:
            self.norm = StackedBatchNorm(replicates, outputs, eps=eps, dtype=dtype, world=world)
        self.slope = slope

    def forward(self, x: Float[Tensor, "r b i"]) -> Float[Tensor, "r b o"]:
        """The activations."""
        return F.leaky_relu(self.norm(self.linear(x)), self.slope)

    def with_pullback(self, x: Float[Tensor, "r b i"]) -> tuple[Float[Tensor, "r b o"], Pullback]:
        """The activations outside training, and their derivative at ``x``."""
        y, norm = self.linear(x), self.norm
        h = F.leaky_relu(norm.evaluated(y) if isinstance(norm, StackedBatchNorm) else y, self.slope)

        def pullback(gradient: Tensor) -> Tensor:
            scale = norm.scale().unsqueeze(1) if isinstance(norm, StackedBatchNorm) else h.new_ones(())
            return self.linear.pullback(gradient * torch.where(h > 0, scale, self.slope * scale))

        return h, pullback


def with_pullback(layers: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Pullback]:
    """``Hidden`` layers and affine maps one after the other, and the derivative of all of them at ``x``."""
    backs: list[Pullback] = []
    for layer in layers:
        if isinstance(layer, Hidden):
            x, back = layer.with_pullback(x)
            backs.append(back)
        else:
            assert isinstance(layer, StackedLinear)
            x = layer(x)
            backs.append(layer.pullback)

    def pullback(gradient: Tensor) -> Tensor:
        for back in reversed(backs):
            gradient = back(gradient)
        return gradient

    return x, pullback


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
