"""``python -m modis_dist``: the same as ``modis-dist``."""

from modis_dist.cli.main import main

if __name__ == "__main__":
    main()
