"""Devices for tests: the CPU, and the GPU if there is one."""

import pytest
import torch

ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ("cpu", pytest.param("cuda", marks=ON_A_GPU))

# World size and device. nccl does not support two ranks on one GPU, so a GPU is tested with a single rank.
SINGLE_RANK = ((1, "cpu"), pytest.param((1, "cuda"), marks=ON_A_GPU))
