"""Where a run's rows come from: the store it names or one simulated for it. Knows nothing of models."""

from pathlib import Path

from modis_dist.config.parse import digest, to_tree
from modis_dist.config.run import Data, Simulate
from modis_dist.data.simulate import simulate
from modis_dist.data.store.reader import Store
from modis_dist.runtime.errors import ConfigError, shown


def named_store(data: Data, *, source: str) -> Store | None:
    """The store that ``data`` names, or None where one is to be simulated.

    Raises ``ConfigError`` where there is none, ``DataError`` where it is not sound.
    """
    if data.simulate is not None:
        return None
    if data.store is None:
        raise ConfigError(["data.store: is required (or data.simulate); --set data.store=DIR sets it"], source=source)
    path = Path(data.store)
    if not path.exists():
        advice = "make one with `modis-dist data import SRC --out STORE`, or --set data.store=DIR"
        raise ConfigError([f"data.store: no such folder {shown(str(path))}; {advice}"], source=source)
    return Store.open(path)


def simulated_store(settings: Simulate, *, out: Path) -> Path:
    """Where a simulated store is kept below ``out``."""
    return out / f"store-{digest(to_tree(settings))[:8]}"


def open_store(data: Data, *, out: Path, source: str) -> Store:
    """The store that ``data`` names, or one simulated below ``out``; raises as ``named_store``."""
    named = named_store(data, source=source)
    if named is not None:
        return named
    assert data.simulate is not None
    path = simulated_store(data.simulate, out=out)
    if not path.exists():
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        simulate(data.simulate, path)
    return Store.open(path)
