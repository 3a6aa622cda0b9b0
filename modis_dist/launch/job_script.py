"""What a site profile asks of sbatch."""

from modis_dist.config.cluster import Site


def requests(site: Site, *, nodes: int) -> list[str]:
    """The options of sbatch that say where a job runs and what it gets."""
    named = {"partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint}
    options = [f"--{option}={value}" for option, value in named.items() if value is not None]
    options += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={site.cpus}"]
    if site.gpus:
        options += [f"--gres=gpu:{f'{site.gpu_kind}:' if site.gpu_kind else ''}{site.gpus}"]
    options += [f"--mem={site.memory}"] if site.memory else []
    return [*options, f"--time={site.time}", *site.options]
