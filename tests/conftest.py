"""What every test shares: `--slow`, and GPU tests that are skipped aloud."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--nightly", action="store_true", help="make runs that are killed 300 steps long, with 20 kills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Ranks are forked from this process: one that a test leaves in a process group makes the tests after it fail."""
    yield
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        assert not dist.is_initialized(), "this test left its process in a process group"
