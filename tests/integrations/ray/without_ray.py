"""Two ranks of a training without Ray, as the reference for trainings with Ray; takes seconds."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from modis_dist.config.parse import load_run
from modis_dist.execution.single import train_run
from modis_dist.train.callbacks import NeverStop, NullReporter
from modis_dist.train.process_group import RankSpec, rendezvous_file
from tests.ranks import CONTEXT


def train_two_ranks(run: Path, out: Path, settings: Sequence[str] = ()) -> None:
    """Train a run on two ranks without interruption."""
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as ranks:
        list(ranks.map(_rank, (0, 1), [run] * 2, [out] * 2, [list(settings)] * 2))


def _rank(rank: int, run: Path, out: Path, settings: list[str]) -> None:
    loaded = load_run(run, [*settings, "trainer.workers=2"])
    spec = RankSpec(rank, 2, rendezvous_file(run.parent))
    train_run(loaded, out=out, source=str(run), reporter=NullReporter(), stop=NeverStop(), spec=spec)
