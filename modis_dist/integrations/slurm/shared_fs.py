"""Warning for folders that other nodes of a cluster may not see."""

import logging
from collections.abc import Mapping
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.runtime.file_systems import OF_ONE_MACHINE, file_system


def warn_of_local(folders: Mapping[str, Path], site: Site) -> None:
    """Log a warning that names the folders on a local file system; ``folders`` by what they are for."""
    kinds = {use: file_system(folder) for use, folder in folders.items()}
    local = [f"{use}: {folders[use]} ({kind})" for use, kind in kinds.items() if kind in OF_ONE_MACHINE]
    if local and site.executor == "slurm":
        logging.getLogger(__name__).warning(
            "on a local file system: %s; if the nodes do not see it, jobs fail without a message. Use folders on a "
            "shared file system, unless this machine exports these",
            " and ".join(local),
        )
