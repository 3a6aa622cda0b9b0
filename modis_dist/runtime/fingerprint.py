"""Hardware and software that affect rounding; if they do not change, a resumed training is bit-identical."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modis_dist.runtime.version import __version__, code

CPUS = Path("/proc/cpuinfo")


def machine(device: torch.device, *, ranks: int) -> dict[str, Any]:
    """Return device, ranks, threads and software of this process, by name."""
    return {
        "device": device.type,
        "model": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "program": f"{__version__} ({code()})",
    }


def processor(cpus: Path = CPUS) -> str:
    """Return the model of the CPU, or its architecture if the system does not name the model."""
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a message per changed value. A name that is missing in ``before`` does not count as changed."""
    return [f"{name} {before[name]}, now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
