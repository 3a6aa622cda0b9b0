"""Connect to a running Ray cluster of one or more nodes, which this program neither starts nor stops.

The user gives its address; whoever started the cluster decides where it listens and who may connect.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from modis_dist.execution.resources import Cluster, Node
from modis_dist.integrations.ray.private_cluster import (
    DRIVER_ENVIRONMENT,
    PrivateRay,
    RayBackend,
    connect,
    environment,
    temporary_folder,
    worker_environment,
)
from modis_dist.runtime.errors import DataError, UserError
from modis_dist.runtime.text import shown

CONNECT_S = 5.0
CHECK_S = 120.0  # for every node to start a process and check the folders
STDERR = 2
ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})")


@contextmanager
def ray_at(address: str | None) -> Iterator[RayBackend]:
    """Connect to the Ray cluster at ``HOST:PORT`` during the block; without an address yield a private cluster."""
    if address is None:
        yield PrivateRay()
        return
    workers = worker_environment()
    timeout = {"RAY_gcs_server_port_wait_time_s": "2"}  # Ray retries a wrong token for 20 s otherwise
    with environment({**workers, **DRIVER_ENVIRONMENT, **timeout}):
        _connect(address, workers)
        import ray

        try:
            yield ExistingRay(address, tuple(RayNode.of(node) for node in ray.nodes() if node["Alive"]))
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster."""

    id: str
    host: str
    resources: Node

    @classmethod
    def of(cls, node: dict[str, Any]) -> "RayNode":
        """Return a node from an entry of ``ray.nodes()``."""
        resources = node["Resources"]
        cores_and_gpus = Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
        return cls(str(node["NodeID"]), str(node["NodeManagerAddress"]), cores_and_gpus)


@dataclass(frozen=True)
class ExistingRay:
    """A Ray cluster that this process is connected to."""

    address: str
    nodes: tuple[RayNode, ...]

    @property
    def cluster(self) -> Cluster:
        """Nodes of the cluster."""
        return Cluster(f"the Ray cluster at {self.address}", tuple(node.resources for node in self.nodes))

    @contextmanager
    def ready(self, *, out: Path, store: Path) -> Iterator[Path]:
        """Yield a temporary folder in the output folder; disconnect at the end.

        Raises ``DataError`` naming the nodes that do not see this folder or the store.
        """
        import ray

        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        with temporary_folder(out) as folder:
            try:
                _check_folders(self.nodes, {str(folder): os.R_OK | os.W_OK | os.X_OK, str(store): os.R_OK | os.X_OK})
                yield folder
            finally:
                ray.shutdown()  # ends this driver's tasks and actors


def _connect(address: str, workers: Mapping[str, str]) -> None:
    """Connect to a Ray cluster and set the environment of its workers. Raises ``UserError`` if that fails."""
    match = ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise UserError(f"--ray: {shown(address)} is not HOST:PORT; use the address that `ray start --head` printed")
    host, port = match["host"].strip("[]"), int(match["port"])
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--ray: cannot connect to {address} ({reason}); is that Ray cluster running?") from None
    if not any(_is_node_of(process, port) for process in psutil.process_iter(["cmdline"])):
        raise UserError(f"--ray: this machine is not a node of the cluster at {address}; use one of its nodes")
    import ray

    try:
        with _stderr_closed():
            connect(address=address, runtime_env={"env_vars": dict(workers)})
    except Exception as error:  # Ray raises many types
        ray.shutdown()  # it may be half connected
        raise UserError(f"--ray: {address}: {connection_error(error)}") from error


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Discard the standard error of Ray's C++ library, which also raises its errors."""
    before, null = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, STDERR)
    try:
        yield
    finally:
        os.dup2(before, STDERR)
        os.close(before)
        os.close(null)


def _is_node_of(process: psutil.Process, port: int) -> bool:
    """Return whether a process is a node of the Ray cluster whose head listens at a port."""
    words = process.info["cmdline"] or []
    return any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)


def connection_error(error: BaseException) -> str:
    """Return the cause of a failed connection to Ray as one line."""
    texts, cause = [str(error)], error.__cause__ or error.__context__
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(texts)
    if "AuthToken" in text or "Unauthenticated" in text or "authentication" in text:
        return (
            "authentication failed (token mismatch); set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as for its `ray start`"
        )
    versions = re.findall(r"(Ray|Python): (\S+)", text)
    if "ersion mismatch" in text and len(versions) == 4:
        theirs, ours = (" on ".join(map(" ".join, pair)) for pair in (versions[:2], versions[2:]))
        return f"the cluster runs {theirs}, this is {ours}; both must be the same"
    return shown(str(error).strip().partition("\n")[0])


def _check_folders(nodes: Sequence[RayNode], access: Mapping[str, int]) -> None:
    """Check on every node that folders allow an access. Raises ``DataError`` naming the nodes where one does not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check = ray.remote(num_cpus=0, max_retries=0)(inaccessible)
    tasks = {
        check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(access): node
        for node in nodes
    }
    ray.wait(list(tasks), num_returns=len(tasks), timeout=CHECK_S)
    problems = []
    for task, node in tasks.items():
        try:
            problems += [f"{node.host} has no access to {path}" for path in ray.get(task, timeout=1)]
        except Exception as error:
            reason = str(error).strip() or f"no answer within {CHECK_S:.0f} s"
            problems.append(f"{node.host} cannot run modis-dist: {shown(reason.splitlines()[-1])}")
    if problems:
        raise DataError(f"--ray: {'; '.join(problems)}; every node needs this program, the output folder and the store")


def inaccessible(access: Mapping[str, int]) -> list[str]:
    """Return the folders that are missing for this process or do not allow an access (``os.access``)."""
    return [path for path, mode in access.items() if not os.access(path, mode)]
