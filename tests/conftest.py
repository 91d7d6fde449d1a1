"""Triton runs in its interpreter (there may be no GPU), fresh memory is poisoned, hypothesis has two profiles."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=60, **_COMMON)
settings.register_profile("full", max_examples=2200, **_COMMON)
settings.load_profile(os.environ.get("ANIMA_FAST_TEST_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch):
    """Each test starts from one seed, and `new_empty` and `empty` give NaN, so that unwritten results show."""
    torch.manual_seed(0)
    monkeypatch.delenv("ANIMA_FAST_BACKEND", raising=False)

    def poisoned(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type == "cpu" else tensor

        return allocate_nan

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def one_thread():
    """For tests of tiny models: on tensors that small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of the tiny random pipeline (`tiny_pipeline`); not to be written to."""
    import tiny_pipeline

    directory = tmp_path_factory.mktemp("model")
    tiny_pipeline.save(directory)
    return directory
