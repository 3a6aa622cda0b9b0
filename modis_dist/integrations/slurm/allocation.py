"""Ray on the nodes of one Slurm job."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.execution.resources import Cluster, Node, cores
from modis_dist.integrations.ray.existing_cluster import ray_at
from modis_dist.integrations.ray.multi_node import ray_on_nodes
from modis_dist.integrations.ray.private_cluster import PrivateRay, RayBackend
from modis_dist.integrations.slurm.job_script import python
from modis_dist.integrations.slurm.submission import folder_of


@contextmanager
def ray_of_job(out: Path, site: Site) -> Iterator[RayBackend]:
    """Start Ray in this job: on one node it listens on loopback only, on several it requires a token."""
    if site.nodes == 1:
        yield PrivateRay(Cluster("this job", (Node(min(site.cpus, cores()), site.gpus),)))
        return
    with (
        ray_on_nodes(folder_of(out), nodes=site.nodes, cpus=site.cpus, gpus=site.gpus, python=python(site)) as address,
        ray_at(address) as backend,
    ):
        yield backend
