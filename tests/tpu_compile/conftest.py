"""The one run of the compiler whose report all these tests read."""

from typing import Any

import pytest

from tests.tpu_compile import launch


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    if not launch.is_installed():
        if request.config.getoption("--require-tpu-compiler"):
            pytest.fail(f"the TPU compiler is not installed: {launch.HOW_TO_INSTALL}")
        pytest.skip(f"no TPU compiler: {launch.HOW_TO_INSTALL}")
    return launch.compile_report()
