"""A Ray that others have started, on one or more nodes: attached to and left again, never started and never stopped.

Its address is always given by the user; where it listens, and who may enter, is decided by whoever started it.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from modis_dist.execution.resources import Cluster, Node
from modis_dist.integrations.ray.private_cluster import (
    OF_DRIVER,
    PrivateRay,
    RayBackend,
    connect,
    environment,
    for_workers,
    temporary_folder,
)
from modis_dist.runtime.errors import DataError, UserError, shown

ANSWER_S = 5.0  # from whoever listens at the address
LOOK_S = 120.0  # for every node to start a process and look at the folders
STDERR = 2
ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]):(?P<port>[0-9]{1,5})")


@contextmanager
def ray_at(address: str | None) -> Iterator[RayBackend]:
    """The Ray at ``HOST:PORT``, attached for the time of the block, or without one a private Ray."""
    if address is None:
        yield PrivateRay()
        return
    workers = for_workers()
    brief = {"RAY_gcs_server_port_wait_time_s": "2"}  # a wrong token is tried for 20 s otherwise
    with environment({**workers, **OF_DRIVER, **brief}):
        _attach(address, workers)
        import ray

        try:
            yield GivenRay(address, tuple(RayNode.of(told) for told in ray.nodes() if told["Alive"]))
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayNode:
    """What a node offers, and how it is called."""

    id: str
    host: str
    offers: Node

    @classmethod
    def of(cls, told: dict[str, object]) -> "RayNode":
        """From what Ray tells."""
        held = told["Resources"]
        assert isinstance(held, dict)
        offers = Node(int(held.get("CPU", 0)), int(held.get("GPU", 0)))
        return cls(str(told["NodeID"]), str(told["NodeManagerAddress"]), offers)


@dataclass(frozen=True)
class GivenRay:
    """A Ray this process is attached to."""

    address: str
    nodes: tuple[RayNode, ...]

    @property
    def cluster(self) -> Cluster:
        """Its nodes."""
        return Cluster(f"the Ray at {self.address}", tuple(node.offers for node in self.nodes))

    @contextmanager
    def ready(self, *, out: Path, store: Path) -> Iterator[Path]:
        """A temporary folder in the output folder, which every node must see; at the end Ray is left.

        Raises ``DataError`` naming the nodes that do not see it, or the store.
        """
        import ray

        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        with temporary_folder(out) as folder:
            try:
                _look(self.nodes, {str(folder): os.R_OK | os.W_OK | os.X_OK, str(store): os.R_OK | os.X_OK})
                yield folder
            finally:
                ray.shutdown()  # ends what is ours and still runs


def _attach(address: str, workers: Mapping[str, str]) -> None:
    """Connect to a Ray, whose workers get an environment. Raises ``UserError`` where that cannot be."""
    found = ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65535:
        raise UserError(f"--ray: {shown(address)} is not HOST:PORT; name the address that `ray start --head` printed")
    host, port = found["host"].strip("[]"), int(found["port"])
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--ray: nobody answers at {address} ({why}); is that Ray running?") from None
    if not any(_is_of(process, port) for process in psutil.process_iter(["cmdline"])):
        raise UserError(f"--ray: no node of a Ray at {address} runs on this machine; start the command on one of them")
    import ray

    try:
        with _silent_library():
            connect(address=address, runtime_env={"env_vars": dict(workers)})
    except Exception as error:  # of many types
        ray.shutdown()  # it may have come half way
        raise UserError(f"--ray: {address}: {refusal(error)}") from error


@contextmanager
def _silent_library() -> Iterator[None]:
    """Nothing on standard error from Ray's library, which writes there past Python; what matters it raises too."""
    before, nowhere = os.dup(STDERR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDERR)
    try:
        yield
    finally:
        os.dup2(before, STDERR)
        os.close(before)
        os.close(nowhere)


def _is_of(process: psutil.Process, port: int) -> bool:
    """Whether a process is a node of the Ray whose head listens at a port."""
    words = process.info["cmdline"] or []
    return any(word.startswith("--gcs-address=") and word.endswith(f":{port}") for word in words)


def refusal(error: BaseException) -> str:
    """Why Ray does not let us in, in one line."""
    told, cause = [], error.__cause__ or error.__context__
    while cause is not None:
        told.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    whole = "\n".join([str(error), *told])
    if "AuthToken" in whole or "Unauthenticated" in whole or "authentication" in whole:
        return "it does not take this token; set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as for its `ray start`"
    versions = re.findall(r"(Ray|Python): (\S+)", whole)
    if "ersion mismatch" in whole and len(versions) == 4:
        theirs, ours = (" on ".join(map(" ".join, pair)) for pair in (versions[:2], versions[2:]))
        return f"it is {theirs}, this is {ours}; both must be the same"
    return shown(str(error).strip().partition("\n")[0])


def _look(nodes: Sequence[RayNode], wanted: Mapping[str, int]) -> None:
    """Have every node look for folders. Raises ``DataError`` naming the nodes that may not use one as they must."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(unusable)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(wanted): node
        for node in nodes
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
    problems = []
    for answer, node in asked.items():
        try:
            problems += [f"{node.host} does not see {path}, or may not use it" for path in ray.get(answer, timeout=1)]
        except Exception as error:
            said = str(error).strip() or f"no answer for {LOOK_S:.0f} s"
            problems.append(f"{node.host} cannot run modis-dist: {shown(said.splitlines()[-1])}")
    if problems:
        raise DataError(f"--ray: {'; '.join(problems)}; every node needs this program, the output folder and the store")


def unusable(wanted: Mapping[str, int]) -> list[str]:
    """The folders that are not there for this process, or that it may not use as it must (``os.access``)."""
    return [path for path, use in wanted.items() if not os.access(path, use)]
