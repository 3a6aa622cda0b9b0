"""Time of one step of modis_dist by operator and by group of operators.

Each setting has one row per group (its operator is `all`), then rows of the operators with the largest times. `ms`
(self time, without called operators; on a GPU the kernel time) and `calls` are per step; `fraction` is the part of the
whole step. The profiler adds a few microseconds to every CPU call, which exaggerates the time of small shapes: compare
fractions, and take times from `step`.

    python -m tools.bench profile --shapes intersim --batches 32
    python -m tools.bench profile --shapes tcga10 --batches 32 --precisions fp32 bf16 --replicates 8 --top 30
    python -m tools.bench profile --device cuda --json
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from tools.bench import options, ours
from tools.bench.measure import Row
from tools.bench.shapes import Setting

WARM_UP = 3  # steps
GROUPS = {  # operators that compute; their callers (`linear`, `to`) are in `other`, so that calls count once
    "products": "mm addmm addmm_ bmm baddbmm",
    "normalisation": "native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward",
    "optimiser": "_fused_adam_ _foreach_add_ _foreach_sub_ _amp_update_scale_"
    " _amp_foreach_non_finite_check_and_unscale_",
    "elementwise": "add add_ sub sub_ rsub mul mul_ div div_ neg abs exp expm1 log pow sqrt rsqrt reciprocal"
    " addcmul addcmul_ addcdiv_ where clamp_min leaky_relu leaky_relu_ leaky_relu_backward softplus softplus_backward"
    " eq ne ge gt le lt bitwise_and bitwise_not logical_not",
    "copies": "copy_ cat clone fill_ zero_ index_select index index_copy_ gather",
}
GROUP_OF = {f"aten::{name}": group for group, names in GROUPS.items() for name in names.split()}


@dataclass(frozen=True)
class Spent:
    """Time and calls of an operator in one step."""

    operator: str
    calls: float
    ms: float

    @property
    def group(self) -> str:
        """Return the key of ``GROUPS`` with this operator; the optimiser's own Python code counts as optimiser."""
        return "optimiser" if self.operator.startswith("Optimizer.") else GROUP_OF.get(self.operator, "other")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: shapes, replicates and number of operators."""
    options.of_shapes(parser)
    options.of_settings(parser)
    parser.add_argument("--replicates", nargs="+", type=options.positive, default=[1], help="replicates in a stack")
    parser.add_argument("--steps", type=options.positive, default=5, help="profiled steps (default 5)")
    parser.add_argument("--top", type=options.positive, default=15, help="number of operators shown (default 15)")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield rows of groups, then of operators, for every setting and stack size."""
    for setting in options.settings(arguments):
        for replicates in arguments.replicates:
            operators = spent(setting, replicates=replicates, steps=arguments.steps)
            for row in fractions(operators, top=arguments.top):
                yield setting.columns() | {"replicates": replicates} | row


def fractions(operators: Sequence[Spent], *, top: int) -> Iterator[Row]:
    """Yield groups, then the ``top`` operators, both in order of decreasing time."""
    whole = sum(spent.ms for spent in operators) or 1.0
    ms, calls = Counter[str](), Counter[str]()
    for spent in operators:
        ms[spent.group] += spent.ms  # type: ignore[assignment]
        calls[spent.group] += spent.calls  # type: ignore[assignment]
    for group, taken in ms.most_common():
        yield {"group": group, "operator": "all", "calls": calls[group], "ms": taken, "fraction": taken / whole}
    for spent in sorted(operators, key=lambda spent: -spent.ms)[:top]:
        yield {"group": spent.group, **vars(spent), "fraction": spent.ms / whole}


def spent(setting: Setting, *, replicates: int, steps: int) -> list[Spent]:
    """Return every operator of a step after warm-up."""
    training = ours.Training(setting, replicates=replicates)
    step = partial(training.learn_uncaptured, ours.random_batch(setting, replicates=replicates))
    for _ in range(WARM_UP):
        step()
    on_gpu = setting.device.type == "cuda"
    events = profiled(step, steps, on_gpu=on_gpu)
    times = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return [Spent(str(event.key), event.count / steps, getattr(event, times) / steps / 1e3) for event in events]


def profiled(step: Callable[[], object], steps: int, *, on_gpu: bool) -> list[FunctionEventAvg]:
    """Return the operators of a number of steps.

    GPU kernels have separate entries in addition to the operators that launch them; these are left out.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    return [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
