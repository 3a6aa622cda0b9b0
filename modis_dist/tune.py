"""``python -m modis_dist.tune STUDY.yaml``: the main job, the same as ``modis-dist tune``."""

import sys

from modis_dist.cli.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
