"""Where the time of a training step goes: the step of a shape, timed, then profiled operator by operator.

    python tools/step_profile.py                                            # GPU where there is one
    python tools/step_profile.py --features 537 279 129 --precision bf16 --replicates 8 --json

Random rows and labels; both phases with every loss, as `train` takes them. The profiler slows a step down, so that its
share of the time is what to look at.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.objective import Batch, Rules, Weights
from modis_dist.train.loop import LOWER_PRECISION
from modis_dist.train.machine import machine
from modis_dist.train.prepare import build_shape
from modis_dist.train.state import Setup, TrainState

WARM_UP = 3  # steps
PROFILED = 5  # steps


@dataclass(frozen=True)
class Wanted:
    """What is measured."""

    features: list[int]
    classes: int
    rows: int
    replicates: int
    precision: str
    device: torch.device


def taking_steps(wanted: Wanted) -> Callable[[], None]:
    """A training in motion: one call is one step."""
    tree = {"optim": {"batch_size": wanted.rows}, "trainer": {"precision": wanted.precision}}
    run = parse.build(Run, tree, source="profile")
    features = {f"m{number}": count for number, count in enumerate(wanted.features)}
    lower, device, r = LOWER_PRECISION[wanted.precision], wanted.device, wanted.replicates
    shape = build_shape(run, features, wanted.classes)
    state = TrainState.start(shape, range(r), Setup(run.optim, device, scaled=lower == torch.float16))
    objective, ones = run.objective, torch.ones(r, device=device)
    rules = Rules(objective.kl_reduction, objective.penalty, objective.penalty_on, lower)
    weights = Weights(
        beta=objective.beta * ones,
        adversarial=ones,
        lambda_r=ones,
        label=ones,
        clustering=ones,
        confidence=0.5 * ones,
        prior=torch.full((r, wanted.classes), 1 / wanted.classes, device=device),
        losses=(objective.adversarial_loss,) * r,
    )
    noise = torch.randn(2, r, len(features), wanted.rows, shape.latent, device=device)
    signs = torch.ones(r, len(features), wanted.rows, len(features), device=device) if rules.penalty == "each" else None
    batch = Batch(
        tuple(torch.randn(r, wanted.rows, count, device=device) for count in wanted.features),
        torch.randint(-1, wanted.classes, (r, len(features), wanted.rows), device=device),
        noise[0],
        noise[1],
        signs,
    )

    def step() -> None:
        state.adversary.learn(batch, weights, rules)
        state.vaes.learn(batch, weights, rules)

    return step


def finished(device: torch.device) -> float:
    """The time at which all that was asked of a device is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measured(wanted: Wanted, *, steps: int, top: int) -> dict[str, Any]:
    """Seconds of a step, and its operators, those first that take most of the device's time."""
    step, seconds = taking_steps(wanted), []
    for _ in range(WARM_UP):
        step()
    for _ in range(steps):
        began = finished(wanted.device)
        step()
        seconds.append(finished(wanted.device) - began)
    on_gpu = wanted.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(PROFILED):
            step()
        finished(wanted.device)
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
    whole = sum(getattr(event, spent) for event in operators)
    rows = [
        {
            "operator": event.key,
            "calls": event.count / PROFILED,
            "cpu_us": event.self_cpu_time_total / PROFILED,
            "gpu_us": event.self_device_time_total / PROFILED if on_gpu else 0.0,
            "share": getattr(event, spent) / whole,
        }
        for event in operators[:top]
    ]
    place = machine(wanted.device, ranks=1)
    return {"step_ms": 1e3 * median(seconds), "least_ms": 1e3 * min(seconds), **place, "operators": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[2000, 1000, 500], help="of each modality")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rows", type=int, default=128, help="of each modality in a batch")
    parser.add_argument("--replicates", type=int, default=1)
    parser.add_argument("--precision", choices=sorted(LOWER_PRECISION), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--top", type=int, default=15, help="operators that are shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    wanted = Wanted(
        asked.features, asked.classes, asked.rows, asked.replicates, asked.precision, torch.device(asked.device)
    )
    found = measured(wanted, steps=asked.steps, top=asked.top)
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    title = (
        f"{found['step_ms']:.2f} ms a step (median of {asked.steps}; least {found['least_ms']:.2f}), {found['model']}"
    )
    table = Table("operator", "calls a step", "CPU us", "GPU us", "share", title=title)
    for row in found["operators"]:
        numbers = (f"{row['calls']:.1f}", f"{row['cpu_us']:.0f}", f"{row['gpu_us']:.0f}", f"{row['share']:.1%}")
        table.add_row(row["operator"], *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
