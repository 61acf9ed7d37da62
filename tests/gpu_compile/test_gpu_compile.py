"""Guards without a GPU: what the compiler makes of every attention kernel and of the step of an 8B model on H100s."""

import itertools

import pytest

from jaxserve.checkpoint.shapes import read_shape
from tests.described_step import MODEL, NUM_LAYERS
from tests.gpu_compile.cases import APPENDS, KERNELS, PREFILL_SPILLS, PRODUCTS, STEPS

pytestmark = pytest.mark.timeout(500)  # the first to ask for the report waits for all of it

COLLECTIVES = {"kAllReduce", "kAllGather", "kAsyncStart", "kAsyncDone"}
SHORTEST_GRAPH = 5  # launches: XLA makes no graph of fewer, `xla_gpu_graph_min_graph_size`


@pytest.fixture(params=STEPS)
def case(request):
    return STEPS[request.param]


@pytest.fixture
def step(request, report):
    found = report[request.node.callspec.params["case"]]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_fits_in_registers_and_shared_memory(name, report):
    case, found = KERNELS[name], report[name]
    if case.refused:
        assert case.refused in found.get("error", "")
        return
    assert "error" not in found, found["error"]
    assert found["registers"]
    assert found["spilled_bytes"] and max(found["spilled_bytes"]) <= case.spilled_bytes
    assert found["temp_bytes"] < found["cache_bytes"]  # it is read where and as it lies


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_one_kernel_that_fits_in_registers(name, report):
    found = report[name]
    assert "error" not in found, found["error"]
    assert len(found["registers"]) == 1
    if PRODUCTS[name].tokens <= PRODUCTS[name].tuning.many_tokens:  # the block starts with what setmaxnreg divides
        assert found["registers"] == [65536 // (128 * 5) // 8 * 8]
    assert found["spilled_bytes"][0] <= PRODUCTS[name].spilled_bytes


@pytest.mark.parametrize("name", APPENDS)
def test_append_fits_in_registers_and_is_in_place(name, report):
    found = report[name]
    assert "error" not in found, found["error"]
    assert found["spilled_bytes"] == [0]
    assert found["alias_bytes"] == found["cache_bytes"] > found["temp_bytes"]


def test_step_lowers_and_compiles_each_kernel_once(case, step):
    kernels = 2 * (case.bucket.decode_rows > 0) + (case.bucket.prefill_tokens > 0)  # decode has one that combines
    kernels += case.rope_append
    assert step["kernels_lowered"] == len(step["registers"]) == kernels
    assert step["kernels_called"] == kernels * NUM_LAYERS
    assert max(step["spilled_bytes"]) <= (PREFILL_SPILLS if case.bucket.prefill_tokens else 0)


def test_step_updates_the_cache_in_place(case, step):
    assert step["alias_bytes"] >= NUM_LAYERS * step["layer_cache_bytes"]
    assert len(step["cache_sized"]) == NUM_LAYERS  # what writes each layer's new keys and values
    writes = "custom-call" if case.rope_append else "scatter"
    assert all(writes in what for what, _ in step["cache_sized"])
    assert step["temp_bytes"] < step["layer_cache_bytes"]


def test_step_reads_each_weight_once_and_as_it_lies(case, step):
    readers = dict(step["weight_readers"])
    rows_of_embed = case.bucket.num_tokens * read_shape(MODEL).hidden_size
    assert all(elements <= rows_of_embed for _, elements in readers.pop("embed"))
    assert len(readers) == 1 + 4 * NUM_LAYERS
    assert {name: found for name, found in readers.items() if len(found) != 1} == {}
    assert {name: what for name, [(what, _)] in readers.items() if "gemm" not in what} == {}
    assert step["weight_sized"] == step["copies"] == []


def test_step_has_no_large_temporaries(case, step):
    config, tokens = read_shape(MODEL), case.bucket.num_tokens
    ffn = 4 * tokens * 2 * config.intermediate_size // case.tensor
    residuals = 4 * tokens * 4 * config.hidden_size
    split_rows = 2**21  # where decode attention's streams leave the parts of a row that several of them have
    # The eighth of the head is so narrow that XLA makes the product in four parts, in f32.
    head_parts = 4 * 4 * tokens * config.vocab_size // case.tensor if case.tensor == 8 else 0
    assert step["temp_bytes"] <= ffn + residuals + split_rows + head_parts


def test_step_has_no_loop(case, step):
    assert not {"while", "conditional", "call"} & set(step["opcodes"])


def test_step_is_one_graph_but_for_collectives(case, step):
    """XLA leaves collectives out of graphs unless asked (``captures_collectives``): then they cut the step in pieces,
    and of those the shortest are launched kernel by kernel."""
    if case.tensor == 1 or case.captures_collectives:
        assert step["launches"] == ["kCommandBuffer"]
        return
    assert step["launches"].count("kAllReduce") == 2 * NUM_LAYERS
    cuts = {*COLLECTIVES, "kCommandBuffer"}
    for is_cut, run in itertools.groupby(step["launches"], lambda kind: kind in cuts):
        assert is_cut or len(list(run)) < SHORTEST_GRAPH
