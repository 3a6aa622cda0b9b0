"""Reuse of freed memory by a training process, measured by page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from modis_dist.train import cpu_settings
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(16):
    if turn == 5:
        before = faults()
    gradients = [torch.ones(9_000_000) for _ in range(8)]  # 36 MB each; glibc may keep smaller ones anyway
    del gradients
print(faults() - before)
"""


def faults(first: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_memory_freed_by_a_step_is_reused_by_the_next() -> None:
    assert faults("cpu_settings.use(1)") < 0.05 * faults("torch.set_num_threads(1)")
