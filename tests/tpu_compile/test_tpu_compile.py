"""What a step becomes for TPU slices that are not there: the TPU's own compiler, described topologies."""

import pytest

from tests.described_step import NUM_LAYERS
from tests.tpu_compile.cases import STEPS


@pytest.fixture(params=STEPS)
def step(request, report):
    found = report[request.param]
    assert "error" not in found, found["error"]
    return found | {"case": STEPS[request.param]}


def test_cache_is_updated_in_place(step):
    assert step["alias_bytes"] >= NUM_LAYERS * step["layer_cache_bytes"]
    assert step["temp_bytes"] < step["layer_cache_bytes"] / 2


def test_each_device_has_its_share_of_the_weights(step):
    case = step["case"]
    held = step["weight_bytes"] + NUM_LAYERS * step["layer_cache_bytes"]
    assert held <= step["argument_bytes"] < 1.02 * held
    # Bytes: layers of a stage, and embedding and head, of which each stage has its part.
    whole = NUM_LAYERS * 218e6 * 2 + 2 * 128_256 * 4096 * 2 / case.stage
    assert 0.99 < step["weight_bytes"] * case.tensor / whole < 1.01


def test_devices_exchange_what_the_mesh_asks_for_and_no_more(step):
    """A sum for the embedding, two a layer, and activations once to the next stage."""
    case, collectives = step["case"], dict(step["collectives"])
    assert collectives.pop("all-reduce") >= 2 * NUM_LAYERS
    assert collectives == ({"collective-permute": 1} if case.stage > 1 else {})
