"""Opening of the store of a run: an existing one, or one simulated for the run."""

from pathlib import Path

from modis_dist.config.parse import digest, to_tree
from modis_dist.config.run import Data, Simulate
from modis_dist.data.simulate import simulate
from modis_dist.data.store.reader import Store
from modis_dist.runtime.errors import ConfigError
from modis_dist.runtime.text import shown


def named_store(data: Data, *, source: str) -> Store | None:
    """Open ``data.store``; return None for a simulated store.

    Raises ``ConfigError`` if no store is set or the folder does not exist, ``DataError`` if the store is damaged.
    """
    if data.simulate is not None:
        return None
    if data.store is None:
        raise ConfigError(["data.store: required (or data.simulate); set it with --set data.store=DIR"], source=source)
    path = Path(data.store)
    if not path.exists():
        advice = "create it with `modis-dist data import SRC --out STORE`, or set another with --set data.store=DIR"
        raise ConfigError([f"data.store: no such folder {shown(str(path))}; {advice}"], source=source)
    return Store.open(path)


def simulated_store(settings: Simulate, *, out: Path) -> Path:
    """Return the folder of a simulated store below ``out``."""
    return out / f"store-{digest(to_tree(settings))[:8]}"


def open_store(data: Data, *, out: Path, source: str) -> Store:
    """Open ``data.store``, or simulate a store below ``out``; raises as ``named_store``."""
    named = named_store(data, source=source)
    if named is not None:
        return named
    assert data.simulate is not None
    path = simulated_store(data.simulate, out=out)
    if not path.exists():
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        simulate(data.simulate, path)
    return Store.open(path)
