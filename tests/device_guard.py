"""A GPU that a test's kernel has left unusable fails whatever its process asks of it: that process ends with the test.

Of several processes (pytest-xdist with ``--max-worker-restart``) another takes its place; alone, it ends the run.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest


def is_usable() -> bool:
    """Whether the default device still computes."""
    import jax

    try:
        return float(jax.numpy.ones(8).sum()) == 8
    except Exception:  # whatever it was that the kernel did
        return False


class DeviceGuard:
    """A plugin of pytest."""

    def __init__(self):
        self._failed: str | None = None  # the test that runs, if it needs a GPU and has failed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        if report.failed and item.get_closest_marker("gpu"):
            self._failed = item.nodeid
        return report

    def pytest_runtest_logfinish(self) -> None:
        failed, self._failed = self._failed, None
        if failed is None or is_usable():
            return
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # the test's report has been sent
        pytest.exit(f"the device is not usable after {failed}", returncode=1)
