"""Content of the golden files: twenty float64 steps of the toy system for each adversarial loss."""

import json
from pathlib import Path

from modis_dist.objective import Rules
from tests.numeric.toy_system import batch, start, step, weights

FOLDER = Path(__file__).parent / "golden"
STEPS = 20
ROWS = 8


def run(kind: str) -> list[dict[str, float]]:
    """Return every term of every step, summed over modalities, and the totals, with 12 significant digits."""
    state, loss_weights = start([42]), weights([kind])
    rows = []
    for number in range(STEPS):
        adversary, vae = step(state, batch(number, rows=ROWS), loss_weights, Rules())
        terms = adversary.parts | vae.parts | {"total_d": adversary.total.detach(), "total_g": vae.total.detach()}
        rows.append({name: float(f"{float(value.sum()):.12g}") for name, value in terms.items()})
    return rows


def path(kind: str) -> Path:
    """Return the file of a golden run."""
    return FOLDER / f"{kind}.json"


def text(kind: str) -> str:
    """Return the content of its file."""
    return json.dumps(run(kind), indent=1) + "\n"
