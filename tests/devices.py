"""Devices for tests: the CPU, and the GPU if there is one."""

import pytest
import torch

ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ("cpu", pytest.param("cuda", marks=ON_A_GPU))

# Ranks and their device: nccl has no two ranks on one GPU, so that there the world is one rank that talks to itself.
ALONE = ((1, "cpu"), pytest.param((1, "cuda"), marks=ON_A_GPU))
