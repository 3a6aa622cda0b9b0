"""Of the jobs that tests send: every epoch waits, so that trainings last long enough to be disturbed."""

import os
import time
from typing import Any

from modis_dist.train.journal import JournalWriter

genuine = JournalWriter.metrics


def late(*arguments: Any, **settings: Any) -> None:
    time.sleep(float(os.environ["TEST_EPOCH_S"]))
    genuine(*arguments, **settings)


JournalWriter.metrics = late  # type: ignore[method-assign]
