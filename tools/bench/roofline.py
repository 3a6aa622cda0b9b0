"""Time of a step compared with a lower bound from its matrix products and Adam's memory traffic on this machine.

`products_ms`: all matrix products that the method requires (counted in counts.py), each timed alone with the same shape
and precision. `adam_ms`: 28 bytes per parameter (parameter and two moments read and written, gradient read) at the
bandwidth of adding one array to another, together as large as parameters, gradients and moments. Adam cannot start
before the products end, so the bound `floor_ms` is the sum; `over_floor` is our step time divided by it. On a GPU both
are timed in CUDA graphs of many operations, which excludes launch overhead.

    python -m tools.bench roofline --shapes tcga10 --batches 32
    python -m tools.bench roofline --precisions fp32 bf16
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.bench import counts, options
from tools.bench.counts import Product
from tools.bench.measure import TURN_S, Row, Watch, interleaved, repeated, side_by_side
from tools.bench.shapes import Setting
from tools.bench.step import SIDES
from tools.bench.subprocesses import in_subprocesses

ADAM_BYTES = 28  # float32: parameter and two moments read and written, gradient read
ADD_BYTES = 12  # of each number added in place: two read, one written
PRODUCT_TURN_S = 0.02
IN_A_GRAPH = 50  # repeats per CUDA graph; the launch takes microseconds, whatever the graph contains


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: shapes and measurement."""
    options.of_shapes(parser)
    options.of_measurement(parser, turns=15)


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for every setting."""
    for setting in options.settings(arguments):
        watch = Watch()
        products = products_ms(setting, turns=arguments.turns)
        bandwidth = bytes_per_ms(setting, turns=arguments.turns)
        with in_subprocesses(SIDES, setting, device=setting.device) as works:
            times = interleaved(works, turns=arguments.turns, device=setting.device)
        step = side_by_side(setting, replace(times, others=watch.others()))
        yield step | floors(setting, products=products, bandwidth=bandwidth, ours_ms=step["ours_ms"])


def floors(setting: Setting, *, products: float, bandwidth: float, ours_ms: float) -> Row:
    """Return the columns computed from product time (ms) and bandwidth (bytes per ms)."""
    operations = counts.operations(setting.case.shape, rows=setting.batch)
    moved = ADAM_BYTES * counts.parameters(setting.case.shape)
    adam = moved / bandwidth
    return {
        "gflop": operations / 1e9,
        "gflop_per_s": operations / products / 1e6,
        "products_ms": products,
        "adam_mb": moved / 1e6,
        "gb_per_s": bandwidth / 1e6,
        "adam_ms": adam,
        "floor_ms": products + adam,
        "over_floor": ours_ms / (products + adam),
    }


def products_ms(setting: Setting, *, turns: int) -> float:
    """Return the milliseconds of all products of a step, each timed alone."""
    shapes = counts.products(setting.case.shape, rows=setting.batch)
    return sum(times * product_ms(product, setting, turns=turns) for product, times in shapes.items())


def product_ms(product: Product, setting: Setting, *, turns: int) -> float:
    """Return the median milliseconds of one product."""
    dtype = setting.autocast_dtype if product.lower and setting.autocast_dtype else torch.float32
    return floor_ms(taking(product, setting.device, dtype), setting.device, turns=turns, turn_s=PRODUCT_TURN_S)


def floor_ms(step: Callable[[], object], device: torch.device, *, turns: int, turn_s: float = TURN_S) -> float:
    """Return the median milliseconds of a step; on a GPU, without launch overhead."""
    work, times = (captured(step, times=IN_A_GRAPH), IN_A_GRAPH) if device.type == "cuda" else (step, 1)
    return interleaved({"it": repeated(work)}, turns=turns, device=device, turn_s=turn_s).median_ms("it") / times


def captured(step: Callable[[], object], *, times: int) -> Callable[[], None]:
    """Return the replay of one CUDA graph of ``times`` steps."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()  # warm-up: libraries allocate their workspaces
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(times):
            step()

    def replay(_: object = step) -> None:  # keeps the memory that the graph reads
        graph.replay()

    return replay


def taking(product: Product, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return the product on random numbers, with the operand layouts of a linear layer and its gradients."""
    normal = partial(torch.randn, device=device, dtype=dtype)
    stack = () if product.stack == 1 else (product.stack,)
    left, right = normal(*stack, product.rows, product.inner), normal(*stack, product.inner, product.columns)
    if product.layout == "weight":
        left = normal(*stack, product.inner, product.rows).mT
    if product.layout == "forward":
        right = normal(*stack, product.columns, product.inner).mT
        if not stack:
            return partial(F.linear, left, right.mT, normal(product.columns))
    return partial(torch.matmul, left, right)


def bytes_per_ms(setting: Setting, *, turns: int) -> float:
    """Return the bandwidth of in-place addition (bytes per ms), with as many numbers as Adam reads and writes."""
    several = 2 * counts.parameters(setting.case.shape)
    a, b = torch.ones(2, several, device=setting.device)
    return ADD_BYTES * several / floor_ms(partial(a.add_, b), setting.device, turns=turns)
