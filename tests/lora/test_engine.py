"""Several adapters on one base in one engine, against the oracle with merged weights."""

import dataclasses
import re
from functools import cache
from typing import Any

import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.config import LoraConfig, MatrixFormat, ParallelConfig
from jaxserve.engine.loras import Loras
from jaxserve.errors import RequestError
from jaxserve.execution.adapters import adapters_shape, bytes_a_device, one_slot_shape, place_adapter
from jaxserve.parallel.mesh import make_mesh
from jaxserve.parallel.placed import placed_config
from jaxserve.step_io import Bucket, StepDims, input_shapes
from tests import tiny
from tests.families.golden import sampled_logits
from tests.lora.adapters import merged, random_adapter
from tests.oracle import oracle_greedy, oracle_logits
from tests.quantization.round_to_nearest import quantized_model

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2)
ADAPTERS = {
    "a": random_adapter(CONFIG, 1, rank=3),
    "b": random_adapter(CONFIG, 2, rank=1, parameters=("qkv", "down")),
    "c": random_adapter(CONFIG, 3, rank=2, parameters=("attn_out", "gate_up")),
}


@cache
def base():
    """Two of the tiny model's layers."""
    return dataclasses.replace(tiny.params(), layers=tiny.params().layers[:2])


@cache
def weights(name: str | None):
    return base() if name is None else merged(base(), ADAPTERS[name])


def expected(name: str | None, prompt: list[int], num_tokens: int) -> list[int]:
    return oracle_greedy(CONFIG, weights(name), prompt, num_tokens)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    sizes = {"max_model_len": 96, "max_num_seqs": 4, "num_pages": 40, "page_size": 4, "prefill_sizes": (16,),
             "decode_sizes": (4,), "max_prefill_rows": 3, "samplings": ("any",)}  # fmt: skip
    with Engine.from_params(CONFIG, base(), max_loras=2, max_lora_rank=3, **sizes) as made:
        yield made


@pytest.fixture
def loaded(engine: Engine):
    """The engine with "a" and "b"; afterwards with none."""
    for name in "ab":
        engine.add_lora(name, ADAPTERS[name])
    yield engine
    for adapter in engine.list_loras():
        engine.unload_lora(adapter.name)
    assert engine.stats().recompilations_after_ready == 0


def test_a_batch_mixes_two_adapters_and_the_base(loaded):
    """One prompt for all three: what is cached of it for one must not serve another. And different ones beside it."""
    shared = tiny.prompts(1, seed=1, longest=20)[0] + [5, 6, 7, 8, 9]
    names = [None, "a", "b", None, "b", "a"]
    prompts = [shared] * 3 + tiny.prompts(3, seed=2, longest=12)
    for _ in range(2):  # the second time from the prefix cache
        done = loaded.generate(prompts, greedy(8), lora=names)
        for completion, name, prompt in zip(done, names, prompts, strict=True):
            assert completion.token_ids == expected(name, prompt, 8), name
    assert all(completion.cached_tokens >= len(shared) - 5 for completion in done[:3])


def test_logits_are_those_of_merged_weights(loaded):
    prompt = tiny.prompts(1, seed=3, longest=30)[0]
    for name in ("a", "b"):
        with sampled_logits(loaded) as seen:
            loaded.generate([prompt], greedy(3), lora=name)
        tokens = prompt + expected(name, prompt, 2)
        want = oracle_logits(CONFIG, weights(name), tokens)
        base = oracle_logits(CONFIG, weights(None), tokens)
        for length, logits in seen:
            error = np.abs(logits - want[length - 1]).max() / np.abs(want[length - 1]).max()
            assert error < 2e-5
            assert np.abs(base[length - 1] - want[length - 1]).max() > 0.1  # the adapter says something


def test_adapters_survive_preemption(loaded):
    """40 pages of 4 tokens hold two of four sequences of up to 70 tokens."""
    prompts = [p + [11] * (30 - len(p)) for p in tiny.prompts(4, seed=4, longest=20)]
    names = ["a", "b", None, "a"]
    before = loaded.stats().num_preemptions
    done = loaded.generate(prompts, greedy(40), lora=names)
    assert loaded.stats().num_preemptions > before
    for completion, name, prompt in zip(done, names, prompts, strict=True):
        assert completion.token_ids == expected(name, prompt, 40), name


def test_unloading_waits_for_those_who_use_it(loaded):
    prompt = tiny.prompts(1, seed=5, longest=9)[0]
    stream = loaded.stream(prompt, greedy(12), lora="a")
    tokens = [next(stream).token_id for _ in range(4)]
    early = loaded.make_request(prompt, greedy(2), lora="a")
    loaded.unload_lora("a")
    assert [adapter.name for adapter in loaded.list_loras()] == ["b"]
    with pytest.raises(RequestError, match=re.escape("lora: 'a' is not loaded, loaded are: b")):
        loaded.generate([prompt], greedy(1), lora="a")
    with pytest.raises(RequestError, match="lora: 'a' was unloaded since the request was made"):
        loaded.add_request(early)
    told = "lora_name: max_loras=2 are on the device: 'b'; 'a', unloaded but in use"
    with pytest.raises(RequestError, match=re.escape(told)):
        loaded.add_lora("c", ADAPTERS["c"])
    (other,) = loaded.generate([prompt], greedy(3), lora="b")  # steps of both together
    assert other.token_ids == expected("b", prompt, 3)
    tokens += [event.token_id for event in stream]
    assert tokens == expected("a", prompt, 12)
    assert loaded.add_lora("c", ADAPTERS["c"]).slot == 0
    (completion,) = loaded.generate([prompt], greedy(6), lora="c")
    assert completion.token_ids == expected("c", prompt, 6)


def test_what_another_load_of_the_name_computed_is_not_reused(loaded):
    prompt = tiny.prompts(1, seed=6, longest=9)[0] + [3] * 12
    (first,) = loaded.generate([prompt], greedy(3), lora="a")
    (again,) = loaded.generate([prompt], greedy(3), lora="a")
    assert (first.cached_tokens, again.cached_tokens >= 8) == (0, True)
    loaded.unload_lora("a")
    loaded.add_lora("a", ADAPTERS["c"])
    (other,) = loaded.generate([prompt], greedy(3), lora="a")
    assert other.cached_tokens == 0
    assert other.token_ids == expected("c", prompt, 3)


def test_adapters_go_with_choices_and_embeddings(loaded):
    prompt = tiny.prompts(1, seed=7, longest=15)[0]
    params = SamplingParams(temperature=0, max_tokens=4, n=2, ignore_eos=True, prompt_logprobs=0)
    first, second = loaded.generate([prompt], params, lora="b")
    assert first.token_ids == second.token_ids == expected("b", prompt, 4)
    logits = oracle_logits(CONFIG, weights("b"), prompt)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert first.prompt_logprobs is not None
    given = [entry.logprob for entry in first.prompt_logprobs[1:] if entry is not None]
    np.testing.assert_allclose(given, [logprobs[i, token] for i, token in enumerate(prompt[1:])], atol=1e-4)
    vectors = [loaded.embed([prompt], pooling="mean", lora=name)[0].values for name in ("b", None)]
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


SMALL = {"max_model_len": 32, "max_num_seqs": 1, "num_pages": 8, "page_size": 4, "prefill_sizes": (8,),
         "max_prefill_rows": 1, "samplings": ("greedy",)}  # fmt: skip


def test_on_a_mesh_beside_quantized_weights():
    formats = {
        "qkv": MatrixFormat(kind="int4", group_size=8),
        "attn_out": MatrixFormat(kind="int4", group_size=16, has_perm=True),
        "gate_up": MatrixFormat(kind="int8"),
        "down": MatrixFormat(kind="int8", group_size=8),
    }
    config, params, plain = quantized_model(CONFIG, base(), formats)
    prompt = tiny.prompts(1, seed=8, longest=12)[0]
    with Engine.from_params(config, params, mesh="stage=2,tensor=2", max_loras=1, max_lora_rank=4, **SMALL) as served:
        served.add_lora("a", ADAPTERS["a"])
        (completion,) = served.generate([prompt], greedy(8), lora="a")
        assert completion.token_ids == oracle_greedy(CONFIG, merged(plain, ADAPTERS["a"]), prompt, 8)
        assert served.stats().recompilations_after_ready == 0


def test_devices_that_share_a_kv_head_have_its_adapter_each():
    """Of 4 kv heads with 2 query heads on 8 devices."""
    mesh, placed = make_mesh(ParallelConfig(tensor=8)), placed_config(CONFIG, 8, 96)
    room = adapters_shape(placed, LoraConfig(max_loras=5, max_rank=4), mesh, np.dtype("float32"))
    assert bytes_a_device(room) == 5 * bytes_a_device(one_slot_shape(room))
    layer = place_adapter(ADAPTERS["a"], CONFIG, placed, one_slot_shape(room)).layers[1]
    b = np.pad(ADAPTERS["a"].layers[1]["qkv"][1], ((0, 0), (0, 0), (0, 0), (0, 1)))  # [K, G + 2, H, LR]
    for device in range(8):
        head, copy = divmod(device, 2)
        parts = {name: np.asarray(getattr(layer, name).addressable_shards[device].data) for name in ("q_b", "kv_b")}
        np.testing.assert_array_equal(parts["q_b"][0, 0, 0, :, 0], b[head, copy])
        np.testing.assert_array_equal(parts["kv_b"][0, :, 0, :, 0], b[head, 2:])


def broken(change) -> object:
    adapter = ADAPTERS["b"]
    a, b = adapter.layers[1]["qkv"]
    return dataclasses.replace(adapter, layers=(adapter.layers[0], change(a, b), *adapter.layers[2:]))


def with_nan(a, b):
    return {"qkv": (np.where(np.arange(a.size).reshape(a.shape) == 7, np.nan, a), b)}


@pytest.mark.parametrize(
    "name, adapter, message",
    [
        ("model", ADAPTERS["a"], "lora_name: 'model' is the base model's name"),
        ("", ADAPTERS["a"], "lora_name: '' is not 1 to 256 printable characters"),
        ("a", ADAPTERS["b"], "lora_name: 'a' is loaded already: unload it first"),
        ("x", random_adapter(CONFIG, 0, rank=4), "the adapter's rank 4 is not in 1..max_lora_rank=3"),
        ("x", dataclasses.replace(ADAPTERS["a"], layers=ADAPTERS["a"].layers[:1]), "has 1 layers, the model 2"),
        ("x", broken(lambda a, b: {"qkv": (a, b[..., :0])}), "qkv has B of shape (4, 4, 8, 0), expected (4, 4, 8, 1)"),
        ("x", broken(lambda a, b: {"router": (a, b)}), "layers.1.router cannot have an adapter, only qkv, attn_out, "),
        ("x", broken(with_nan), "layers.1.qkv has A with values that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded(loaded, name, adapter, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded.add_lora(name, adapter)
    assert [adapter.name for adapter in loaded.list_loras()] == ["a", "b"]


def test_what_an_engine_without_room_says():
    plain = Loras(None, CONFIG, loops=(), base_names=())
    assert (plain.loaded(), plain.loads(), plain.config) == ((), (), None)
    told = "this engine has no room for adapters: start it with max_loras"
    for call, field in (
        (lambda: plain.find("a"), "lora"),
        (lambda: plain.place(ADAPTERS["a"]), "lora_name"),
        (lambda: plain.read("a"), "lora_name"),
        (lambda: plain.unload("a"), "lora_name"),
    ):
        with pytest.raises(RequestError, match=f"{field}: {told}"):
            call()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_loras": 1, "lora_modules": {"a": "x", "b": "y"}}, "lora_modules has 2 adapters, max_loras=1"),
        (
            {"lora_modules": {"a": "no/folder"}, "on_progress": lambda *stage: pytest.fail(f"{stage} comes before")},
            "no/folder is not a folder with adapter_config.json",
        ),
        ({"max_loras": -1}, "max_loras=-1 must be at least 0"),
        ({"max_loras": 1, "max_lora_rank": 0}, "max_lora_rank=0 must be at least 1"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            Engine.from_params(CONFIG, base(), **(SMALL | options))


def test_a_name_for_each_prompt(loaded):
    with pytest.raises(ValueError, match="2 prompts but 1 names of adapters"):
        loaded.generate([[5], [6]], greedy(1), lora=["a"])


def test_nothing_crosses_the_corridor_without_room():
    dims = StepDims(num_slots=4, max_pages_per_seq=3, num_pages=10, page_size=4)
    assert "adapter_ids" not in input_shapes(Bucket(4, 0, 0), dims)
    with_room = dataclasses.replace(dims, max_loras=2)
    assert input_shapes(Bucket(4, 0, 0), with_room)["adapter_ids"] == (4,)
