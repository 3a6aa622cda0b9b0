"""Fixtures and options of all tests."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.shapes import set_enabled

# Fixed examples and no deadline: a result depends on the code only, not on the load of the machine.
# `pytest --hypothesis-profile=default` searches for new examples.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

DURATIONS = Path(__file__).parent / "durations.json"  # seconds of slow test functions, written by --save-durations

set_enabled(False)  # tests of formulas enable it


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that measures the durations again."""
    parser.addoption(
        "--save-durations", action="store_true", help=f"write the seconds of slow tests to {DURATIONS.name}"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Measure durations in the process that collects the reports of all workers."""
    if config.getoption("--save-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations())


class Durations:
    """Sums the seconds of each test function; functions that did not run keep their last measurement."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one test."""
        name = _function(report.nodeid)
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the functions that take longer than a second."""
        known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        known |= {name: round(seconds, 1) for name, seconds in self.seconds.items()}
        DURATIONS.write_text(
            json.dumps({name: known[name] for name in sorted(known) if known[name] > 1}, indent=1) + "\n"
        )


def _function(nodeid: str) -> str:
    return nodeid.split("[")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slowest files, because a worker runs the tests of a file one after the other."""
    seconds = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    total: dict[Path, float] = dict.fromkeys((item.path for item in items), 0.0)
    for name, item in {_function(item.nodeid): item for item in items}.items():
        total[item.path] += seconds.get(name, 0.0)
    items.sort(key=lambda item: (-total[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """Deliver SIGINT and SIGHUP to tests and the commands they start, even if pytest runs in the background.

    A shell without job control, such as a batch script, starts background jobs with SIGINT ignored; ``nohup`` ignores
    SIGHUP. Child processes inherit ignored signals but not handlers, so with handlers set they get the default action.
    """
    previous = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data sets beside the repository; tests that need it are skipped without it."""
    folder = Path(os.environ.get("MODIS_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")
    if not (folder / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared")
    return folder


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated store of 60 samples: classes "1" to "3", modalities methylation, expression and protein.

    Shared by all tests; copy it before changing it.
    """
    from modis_dist.config.run import Simulate
    from modis_dist.data.simulate import simulate

    store = tmp_path_factory.mktemp("toy") / "store"
    simulate(Simulate(samples=60, classes=3, seed=5), store)
    return store
