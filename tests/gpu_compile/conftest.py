"""The one run of the compiler whose report all these tests read."""

from typing import Any

import pytest

from tests.gpu_compile import launch


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    if not launch.is_installed():
        if request.config.getoption("--require-cuda-compiler"):
            pytest.fail(f"the CUDA compiler is not installed: {launch.HOW_TO_INSTALL}")
        pytest.skip(f"no CUDA compiler: {launch.HOW_TO_INSTALL}")
    return launch.compile_report()
