"""Settings that several test files share."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

# Helpers that assert:
HELPERS = ("contract", "verdict", "toy_process", "train_process", "sweep_process", "report_runs")
pytest.register_assert_rewrite(*HELPERS)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run by: python -m pytest -m slow")


@pytest.fixture
def not_by_nohup() -> Iterator[None]:
    """SIGHUP does here, and in what is started, what it does by default: runs respect nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision and a fixed seed, for tests in which numbers matter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference cycles stay visible."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
