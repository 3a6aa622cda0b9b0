"""What a pack may ask of this machine. Does not know Ray."""

import os

from modis_dist.config.study import Resources


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_count() -> int:
    """The GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def workers_mistakes(workers: int, *, threads: int, device: str, gpus: int) -> list[str]:
    """Where the ranks of a training, each of some threads or with a GPU of its own, ask for more than there is."""
    problems = []
    if device not in {"auto", "cpu", "cuda"}:
        problems.append(f"trainer.device: {device}: of Ray's workers each has its own GPU; say cuda")
    if gpus and workers > gpus:
        problems.append(f"trainer.workers: {workers} asked for, this machine has {gpus} GPU(s)")
    if workers * threads > cores():
        asked = f"{workers} of {threads} thread(s)"
        problems.append(f"trainer.workers: {asked} asked for, this machine has {cores()} core(s)")
    return problems


def mistakes(resources: Resources, *, gpus: int) -> list[str]:
    """Where a pack asks for more than there is."""
    there = {"gpus": (resources.gpus or 0, gpus), "cpus": (resources.cpus or 0, cores())}
    return [
        f"sweep.resources.{name}: {asked} asked for, this machine has {held}"
        for name, (asked, held) in there.items()
        if asked > held
    ]
