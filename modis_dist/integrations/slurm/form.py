"""Choice between a job array and one allocation for a study, and checks of a study against a profile."""

from math import prod
from typing import Literal

from modis_dist.config.cluster import Site
from modis_dist.config.study import OptunaSearch, Study
from modis_dist.execution.resources import Cluster, Node, resource_mistakes
from modis_dist.integrations.mlflow.store import checked
from modis_dist.integrations.ray.tune import pack_mistakes
from modis_dist.runtime.errors import ConfigError, UserError

Form = Literal["array", "allocation"]


def form_of(study: Study, site: Site, *, requested: Form | None) -> tuple[Form, str]:
    """Return the form of a submission and the reason. Raises ``UserError`` if the requested form is impossible."""
    dependent, local = _dependent_packs(study), site.executor == "local"
    idle_gpus = f"an array task uses only one of its {site.gpus} GPUs" if site.gpus > 1 else None
    if requested == "allocation" and local:
        raise UserError("--form allocation: a local profile has one node; use `modis-dist tune`")
    if requested == "array" and dependent:
        raise UserError(f"--form array: {dependent}; omit --form or use --form allocation")
    if requested == "array" and idle_gpus and not local:
        raise UserError(f"--form array: {idle_gpus}; set gpus: 1 in the profile, omit --form or use --form allocation")
    if requested is not None:
        return requested, "requested by --form"
    if local:
        if dependent:
            raise UserError(f"sweep: {dependent}, and a local profile runs one job at a time; use `modis-dist tune`")
        return "array", "this machine runs one job at a time"
    if dependent or idle_gpus:
        return "allocation", str(dependent or idle_gpus)
    trials, slots = _trials(study), allocation_slots(study, site)
    if trials <= slots:
        return "allocation", f"{site.nodes} node(s) train all {trials} trials at once"
    return "array", f"{trials} trials, but {site.nodes} node(s) train {slots} at once"


def slots_of(study: Study, site: Site, form: Form) -> int:
    """Return the number of packs that the jobs of a submission train at once."""
    if site.executor == "local":
        return 1
    return site.array_parallelism if form == "array" else allocation_slots(study, site)


def allocation_slots(study: Study, site: Site) -> int:
    """Return the number of packs that an allocation trains at once."""
    cluster, resources = _cluster(study, site, nodes=site.nodes), study.sweep.resources
    gpus = resources.gpus if resources.gpus is not None else min(1, cluster.gpus)
    return max(1, cluster.slots(threads=resources.cpus or 1, gpus=gpus) // study.trainer.workers)


def check_profile(study: Study, site: Site, *, form: Form) -> None:
    """Raise ``ConfigError`` if a study needs more than a job of the profile has, or its tracking URI cannot be used."""
    cluster = _cluster(study, site, nodes=site.nodes if form == "allocation" else 1)
    resources, trainer = study.sweep.resources, study.trainer
    if trainer.workers == 1:
        problems = resource_mistakes(resources, cluster=cluster)
    else:
        problems = pack_mistakes(resources, device=trainer.device, cluster=cluster, workers=trainer.workers)
    if trainer.device.startswith("cuda") and not cluster.gpus:
        problems.append(f"trainer.device: {trainer.device} requested, {cluster.has('gpus')}; set gpus in the profile")
    if trainer.precision == "fp16" and not cluster.gpus:
        problems.append(
            f"trainer.precision: fp16 needs a GPU, {cluster.has('gpus')}; set gpus in the profile, or use bf16"
        )
    if problems:
        raise ConfigError(problems, source=study.name)
    if study.sweep.mlflow.tracking_uri is not None:
        checked(study.sweep.mlflow.tracking_uri)


def _cluster(study: Study, site: Site, *, nodes: int) -> Cluster:
    cluster = Cluster("the profile", (Node(site.cpus, site.gpus),) * nodes)
    return cluster.without_gpus() if study.trainer.device == "cpu" else cluster


def _trials(study: Study) -> int:
    sweep = study.sweep
    configurations = sweep.search.configurations if sweep.search else prod(map(len, sweep.grid.values()))
    return configurations * max(1, len(sweep.conditions)) * sweep.folds * sweep.replicates


def _dependent_packs(study: Study) -> str | None:
    """Return the reason the packs of a study cannot be independent jobs; None if they can."""
    if isinstance(study.sweep.search, OptunaSearch):
        return "each round of sweep.search depends on the results of the round before"
    if study.sweep.pruning is not None:
        return "sweep.pruning compares running trainings"
    return "trainer.workers need one Ray cluster" if study.trainer.workers > 1 else None
