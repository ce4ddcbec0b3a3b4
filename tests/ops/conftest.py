"""Every test of an op runs on poisoned memory, on the device the run was asked for."""

import contextlib

import pytest
import torch


# numerics reads which device when it is imported, and a conftest is imported before `--device` is known
@pytest.fixture(autouse=True)
def _poisoned_memory():
    from tests import numerics

    with numerics.poisoned():
        yield


@pytest.fixture(autouse=True)
def _device():
    from tests import numerics

    # for tensors that tests make by hand; problems name their device
    on_cpu = numerics.DEVICE.type == "cpu"
    with contextlib.nullcontext() if on_cpu else torch.device(numerics.DEVICE):
        yield
