"""Device selection, a seed per test, slow tests first, and NaN-filled scratch memory: reading what nothing has written
shows."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):  # workers that each start a thread per core wait for one another
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # and the processes that tests start
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode refuses matrix products
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # a test draws the same numbers, whatever ran before it


def leave_out_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a device, gpu tests are left out of a plain run, and shown as skipped under `-m gpu`."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if config.option.markexpr:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device is visible to torch"))
    else:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def slow_first(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests in an order that lets each worker begin with its share of the slow ones: xdist hands out equal parts of
    the list, and moves short tests, but no long one that has begun, to workers with nothing left to do. What one launch
    of processes serves stays together."""
    together: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            one_launch = item.get_closest_marker("one_launch")
            together.setdefault(str(item.path) if one_launch else item.nodeid, []).append(item)
    others = [item for item in items if not item.get_closest_marker("slow")]
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        part = (len(items) - len(ordered)) // (workers - worker)
        slow = [item for share in list(together.values())[worker::workers] for item in share]
        ordered += slow
        fill = max(0, part - len(slow))
        ordered += others[:fill]
        others = others[fill:]
    return ordered


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        leave_out_gpu(config, items)
    if hasattr(config, "workerinput"):
        items[:] = slow_first(items, config.workerinput["workercount"])


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN inside the test, so that a kernel that leaves something unwritten is caught."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # eager's own operators may have no such form on CUDA
    yield
    torch.use_deterministic_algorithms(before)
