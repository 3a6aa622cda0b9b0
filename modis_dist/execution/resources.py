"""Cores and GPUs of the machine or the nodes that packs are trained on. Independent of Ray."""

import os
from dataclasses import dataclass, replace

from modis_dist.config.study import Resources


@dataclass(frozen=True)
class Node:
    """A machine, or the part of one that may be used."""

    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Cluster:
    """One or more nodes that workers of packs are distributed over; a worker runs on one node."""

    name: str  # in messages
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def without_gpus(self) -> "Cluster":
        """Return the same nodes for trainings that use no GPU."""
        return replace(self, nodes=tuple(replace(node, gpus=0) for node in self.nodes))

    def slots(self, *, threads: int, gpus: float) -> int:
        """Return the number of workers that run at once, each with ``threads`` cores and ``gpus`` (fractional) GPUs."""
        return sum(min(node.cores // threads, _gpu_slots(node, gpus)) for node in self.nodes)

    def threads(self, *, workers: int, gpus: float) -> int:
        """Return the maximum number of threads per worker, at least 1, with which ``workers`` workers run at once."""
        max_cores = max(node.cores for node in self.nodes)
        return next((t for t in range(max_cores, 1, -1) if self.slots(threads=t, gpus=gpus) >= workers), 1)

    def has(self, resource: str) -> str:
        """Return the number of ``cores`` or ``gpus``, as text for a message."""
        counts = [getattr(node, resource) for node in self.nodes]
        unit = {"cores": "core(s)", "gpus": "GPU(s)"}[resource]
        if len(counts) == 1:
            return f"{self.name} has {counts[0]} {unit}"
        return f"{self.name} has {sum(counts)} {unit} on {len(counts)} nodes, at most {max(counts)} on one"


def _gpu_slots(node: Node, each: float) -> int:
    """Return the number of workers that the GPUs of a node can serve; a fraction is never split over two GPUs."""
    if not each:
        return node.cores
    return int(node.gpus // each) if each >= 1 else node.gpus * int(1 / each)


def this_machine() -> Cluster:
    """Return the node that this process runs on."""
    return Cluster("this machine", (Node(cores(), gpu_count()),))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_count() -> int:
    """Return the number of GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def worker_mistakes(workers: int, *, threads: int, device: str, cluster: Cluster) -> list[str]:
    """Return a problem if ``workers`` ranks, each with ``threads`` cores or a GPU, need more than the cluster has."""
    problems = []
    each = min(1, cluster.gpus)
    if device not in {"auto", "cpu", "cuda"}:
        problems.append(f"trainer.device: {device}: every Ray worker has its own GPU; use cuda")
    if each and workers > cluster.gpus:
        problems.append(f"trainer.workers: {workers} requested, {cluster.has('gpus')}")
    elif workers > cluster.slots(threads=threads, gpus=each):
        problems.append(f"trainer.workers: {workers} of {threads} thread(s) requested, {cluster.has('cores')}")
    return problems


def resource_mistakes(resources: Resources, *, cluster: Cluster) -> list[str]:
    """Return a problem for every resource of which a pack needs more than a node has."""
    problems = []
    if (resources.gpus or 0) > max(node.gpus for node in cluster.nodes):
        problems.append(f"sweep.resources.gpus: {resources.gpus} requested, {cluster.has('gpus')}")
    if (resources.cpus or 0) > max(node.cores for node in cluster.nodes):
        problems.append(f"sweep.resources.cpus: {resources.cpus} requested, {cluster.has('cores')}")
    return problems
