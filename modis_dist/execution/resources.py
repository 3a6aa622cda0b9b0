"""What packs may ask of the machine, or the nodes, they are trained on. Does not know Ray."""

import os
from dataclasses import dataclass, replace

from modis_dist.config.study import Resources


@dataclass(frozen=True)
class Node:
    """A machine, or the share of one that may be used."""

    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Cluster:
    """One or more nodes that share out the workers of packs; a worker is never spread over nodes."""

    name: str  # as messages call it
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        """Of all nodes together."""
        return sum(node.gpus for node in self.nodes)

    def without_gpus(self) -> "Cluster":
        """The same for trainings that use none."""
        return replace(self, nodes=tuple(replace(node, gpus=0) for node in self.nodes))

    def places(self, *, threads: int, gpus: float) -> int:
        """How many workers find room at once, each of so many threads and so many GPUs, or such a share of one."""
        return sum(min(node.cores // threads, _sharers(node.gpus, gpus, node.cores)) for node in self.nodes)

    def threads(self, *, workers: int, gpus: float) -> int:
        """The most threads of which so many workers find room at once; at least one."""
        most = max(node.cores for node in self.nodes)
        return next((t for t in range(most, 1, -1) if self.places(threads=t, gpus=gpus) >= workers), 1)

    def has(self, what: str) -> str:
        """What it has of `cores` or `gpus`, in words."""
        held, unit = [getattr(node, what) for node in self.nodes], {"cores": "core(s)", "gpus": "GPU(s)"}[what]
        if len(held) == 1:
            return f"{self.name} has {held[0]} {unit}"
        return f"{self.name} has {sum(held)} {unit} on {len(held)} nodes, {max(held)} at most on one"


def _sharers(held: int, each: float, cores: int) -> int:
    """How many workers the GPUs of a node are enough for; a share is never of two GPUs."""
    if not each:
        return cores
    return int(held // each) if each >= 1 else held * int(1 / each)


def this_machine() -> Cluster:
    """The one node this process runs on."""
    return Cluster("this machine", (Node(cores(), gpu_count()),))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_count() -> int:
    """The GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def workers_mistakes(workers: int, *, threads: int, device: str, cluster: Cluster) -> list[str]:
    """Where the ranks of a training, each of some threads or with a GPU of its own, ask for more than there is."""
    problems = []
    each = min(1, cluster.gpus)
    if device not in {"auto", "cpu", "cuda"}:
        problems.append(f"trainer.device: {device}: of Ray's workers each has its own GPU; say cuda")
    if each and workers > cluster.gpus:
        problems.append(f"trainer.workers: {workers} asked for, {cluster.has('gpus')}")
    elif workers > cluster.places(threads=threads, gpus=each):
        problems.append(f"trainer.workers: {workers} of {threads} thread(s) asked for, {cluster.has('cores')}")
    return problems


def mistakes(resources: Resources, *, cluster: Cluster) -> list[str]:
    """Where a pack asks for more than a node has."""
    problems = []
    if (resources.gpus or 0) > max(node.gpus for node in cluster.nodes):
        problems.append(f"sweep.resources.gpus: {resources.gpus} asked for, {cluster.has('gpus')}")
    if (resources.cpus or 0) > max(node.cores for node in cluster.nodes):
        problems.append(f"sweep.resources.cpus: {resources.cpus} asked for, {cluster.has('cores')}")
    return problems
