"""A study on all nodes of one Slurm job."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.execution.resources import Cluster, Node, cores
from modis_dist.integrations.ray.existing_cluster import ray_at
from modis_dist.integrations.ray.multi_node import ray_on_nodes
from modis_dist.integrations.ray.private_cluster import PrivateRay, RayBackend
from modis_dist.integrations.slurm import submission as kept
from modis_dist.integrations.slurm.job_script import python


@contextmanager
def ray_of_job(out: Path, site: Site) -> Iterator[RayBackend]:
    """Ray on what the job was given: on one node it listens on loopback only, on several it takes a token."""
    if site.nodes == 1:
        yield PrivateRay(Cluster("this job", (Node(min(site.cpus, cores()), site.gpus),)))
        return
    folder = kept.folder_of(out)
    with (
        ray_on_nodes(folder, nodes=site.nodes, cpus=site.cpus, gpus=site.gpus, python=python(site)) as address,
        ray_at(address) as place,
    ):
        yield place
