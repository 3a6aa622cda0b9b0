"""``python -m modis_dist`` is ``modis-dist``."""

import sys
from signal import SIGUSR1

from modis_dist.runtime.processes import defer_signal

if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        defer_signal(SIGUSR1)  # Slurm may send its warning signal during the imports
    from modis_dist.cli.main import main

    main()
