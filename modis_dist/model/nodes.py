"""Networks as single nodes of the graph of derivatives.

A small training spends its time on hundreds of small operations, each with a node of its own in the graph and views on
both ways. Here a network is one node: inside, layers are run and their derivatives taken as ``model.layers`` has them
written out, without a graph. Such a node is differentiated once; where a gradient takes part in a loss (the penalty of
phase D), it is an output of a node like any other.

Legend: r replicates, b rows, i and o features, k logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modis_dist.model.layers import Hidden, LinearMap, StackedLinear, flat, times


class Network:
    """Layers one after the other, then affine heads side by side; in training a node."""

    def __init__(self, layers: Sequence[Hidden | StackedLinear], heads: Sequence[StackedLinear] = ()) -> None:
        self.layers, self.heads = tuple(layers), tuple(heads)
        self.learnable = [p for layer in (*layers, *heads) for p in layer.parameters()]

    def evaluated(self, x: Float[Tensor, "r b i"]) -> tuple[Float[Tensor, "r b _"], ...]:
        """What the last layer returns outside training, and each head."""
        rows = flat(x)
        for layer in self.layers:
            rows = layer(rows)
        return tuple(_stacked(part, like=x) for part in (rows, *(head(rows) for head in self.heads)))

    def trained(self, x: Float[Tensor, "r b i"]) -> tuple[Float[Tensor, "r b _"], ...]:
        """The same in training, in the precision of ``torch.autocast`` around; to be differentiated once."""
        found: tuple[Tensor, ...] = _Trained.apply(x, self, *self.learnable)  # type: ignore[no-untyped-call]
        return found

    def with_gradient(self, x: Float[Tensor, "r b i"], cotangent: Float[Tensor, "r b k"]) -> tuple[Tensor, ...]:
        """The same of layers without normalisation; last, the gradient at ``x`` [r b i], given that of the first head.

        ``x`` itself learns nothing. Parameters learn from all that is returned, at once: in every layer the rows of
        both ways make one product.
        """
        found: tuple[Tensor, ...] = _WithGradient.apply(x, cotangent, self, *self.learnable)  # type: ignore[no-untyped-call]
        return found


def pulled(gradient: Float[Tensor, "r b o"], pull: LinearMap, push: LinearMap) -> Float[Tensor, "r b i"]:
    """``pull`` of a gradient, as a node whose derivative is ``push``, its transpose."""
    found: Tensor = _Pulled.apply(gradient, pull, push)  # type: ignore[no-untyped-call]
    return found


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: Network, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.learning = any(p.requires_grad for p in parameters)
        rows, ctx.backs = flat(x).to(_precision(x)), []
        for layer in network.layers:
            rows, back = layer.trained(rows)
            ctx.backs.append(back)
        heads = [head.trained(rows) for head in network.heads]
        ctx.head_backs = [back for _, back in heads]
        return tuple(_stacked(part, like=x) for part in (rows, *(value for value, _ in heads)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_last: Tensor, *of_heads: Tensor) -> tuple[Tensor | None, ...]:
        own: list[Tensor | None] = []
        gradient = flat(of_last)
        backs, head_backs = _taken(ctx, "backs"), _taken(ctx, "head_backs")
        for back, of_head in zip(head_backs, of_heads, strict=True):
            given, found = back(flat(of_head), learning=ctx.learning)
            gradient = gradient + given
            own += found
        while backs:
            back = backs.pop()
            gradient, found = back(gradient, wanted=bool(backs) or ctx.needs_input_grad[0], learning=ctx.learning)
            own = [*found, *own]
        return (gradient if gradient is None else _stacked(gradient, like=of_last), None, *own)


class _WithGradient(torch.autograd.Function):
    """Forward: activations, and cotangents back through the layers. Backward: tangents along, gradients back again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cotangent: Tensor, network: Network, *_: nn.Parameter) -> tuple[Tensor, ...]:
        layers = [layer for layer in network.layers if isinstance(layer, Hidden) and layer.norm is None]
        assert len(layers) == len(network.layers)
        affines = [layer.linear.affine(x.dtype) for layer in layers]
        heads = [head.affine(x.dtype) for head in network.heads]
        rows, cotangents = [flat(x)], [flat(cotangent)]
        for layer, affine in zip(layers, affines, strict=True):
            rows.append(F.leaky_relu_(affine(rows[-1]), layer.slope))
        gradient = heads[0].pull(cotangents[0])
        for layer, affine, h in zip(layers[::-1], affines[::-1], rows[:0:-1], strict=True):
            cotangents.append(layer.times_slope(gradient, h))
            gradient = affine.pull(cotangents[-1])
        ctx.kept = layers, network.heads, affines, heads, rows, cotangents[::-1]
        return tuple(_stacked(part, like=x) for part in (rows[-1], *(head(rows[-1]) for head in heads), gradient))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_last: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        layers, heads, affines, affine_heads, rows, cotangents = _taken(ctx, "kept")
        *of_heads, of_gradient = map(flat, others)
        tangents = [of_gradient]
        for layer, affine, h in zip(layers, affines, rows[1:], strict=True):
            tangents.append(layer.times_slope(affine.push(tangents[-1]), h))
        own: list[Tensor] = []
        gradient = flat(of_last)
        for head, affine, given in zip(heads, affine_heads, of_heads, strict=True):
            own += head.gradients(given, rows[-1])
            gradient = gradient + affine.pull(given)
        own[0] = own[0] + times(cotangents[-1].mT, tangents[-1]).view_as(own[0])
        for place in reversed(range(len(affines))):
            layer = layers[place]
            given = layer.times_slope(gradient, rows[place + 1])
            both = torch.cat([given, cotangents[place]], -2), torch.cat([rows[place], tangents[place]], -2)
            own = layer.linear.gradients(*both, of_bias=given) + own
            gradient = affines[place].pull(given) if place else gradient
        return (None, None, None, *own)


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, pull: LinearMap, push: LinearMap) -> Tensor:
        ctx.push = push
        return _stacked(pull(flat(gradient)), like=gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        return _stacked(ctx.push(flat(direction)), like=direction), None, None


def _taken(ctx: Any, name: str) -> Any:
    """What a node kept for its derivative, which it keeps no longer: memory is free as soon as it is used."""
    kept = getattr(ctx, name)
    assert kept is not None, "a network is differentiated once"
    setattr(ctx, name, None)
    return kept


def _stacked(rows: Tensor, *, like: Tensor) -> Tensor:
    """The inverse of ``flat``; always another tensor, so that a node which keeps ``rows`` does not keep itself."""
    return rows.unsqueeze(0) if like.shape[0] == 1 else rows.view_as(rows)


def _precision(x: Tensor) -> torch.dtype:
    """The type in which networks compute here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
