"""``python -m modis_dist.tune STUDY.yaml`` is ``modis-dist tune STUDY.yaml``."""

import sys

from modis_dist.cli.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
