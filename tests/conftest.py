"""What tests of every slice share."""

import os
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import settings

from tests.shapes import check

# The same code gets the same answer, on a busy machine too.
# `pytest --hypothesis-profile=default` looks for new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Files whose tests take minutes, in groups of about the same time; those on Slurm share one cluster.
LONG = (
    ("test_studies", "test_doctor", "test_cluster"),
    ("test_ray_train", "test_follower_faults", "test_given_ray"),
    ("test_ray_tune", "test_submitted"),
)


check(False)  # tests of formulas turn it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, on as many workers as there are: each worker of xdist begins with a block of the list."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    rank = {stem: (group, place) for group, stems in enumerate(LONG) for place, stem in enumerate(stems)}
    blocks: list[list[pytest.Item]] = [[] for _ in range(workers)]
    short = [item for item in items if item.path.stem not in rank]
    for item in sorted((item for item in items if item.path.stem in rank), key=lambda item: rank[item.path.stem]):
        blocks[rank[item.path.stem][0] % workers].append(item)
    for block in blocks:
        room = max(0, len(items) // workers - len(block))
        block += short[:room]
        del short[:room]
    items[:] = [*chain.from_iterable(blocks), *short]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MODIS_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared")
    return folder


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated store of 60 samples: classes "1" to "3", modalities methylation, expression and protein.

    One for all tests; copy it before changing it.
    """
    from modis_dist.config.run import Simulate
    from modis_dist.data.simulate import simulate

    store = tmp_path_factory.mktemp("toy") / "store"
    simulate(Simulate(samples=60, classes=3, seed=5), store)
    return store
