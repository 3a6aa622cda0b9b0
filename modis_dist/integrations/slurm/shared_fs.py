"""Whether nodes of a cluster see a folder, as far as this machine can tell."""

import logging
from collections.abc import Mapping
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.runtime.file_systems import OF_ONE_MACHINE, file_system


def warn_of_local(places: Mapping[str, Path], site: Site) -> None:
    """Say which folders, by what they are, jobs on other nodes may not see."""
    kinds = {what: file_system(place) for what, place in places.items()}
    local = [f"{what}: {places[what]} ({kind})" for what, kind in kinds.items() if kind in OF_ONE_MACHINE]
    if local and site.executor == "slurm":
        logging.getLogger(__name__).warning(
            "note: on a file system of this machine are %s; where nodes do not see them jobs fail without a word. Take "
            "folders that all nodes see, unless this machine shares these",
            " and ".join(local),
        )
