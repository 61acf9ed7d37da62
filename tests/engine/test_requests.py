"""What requests may ask, what is refused, and how they end."""

import gc
import signal
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import Engine, RequestError, SamplingParams
from jaxserve.errors import QueueFullError
from jaxserve.model.params import init_params
from tests import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = tiny.prompts(7)[2]


@pytest.fixture(scope="module")
def engine():
    with tiny.engine() as engine:
        yield engine


def drain(engine: Engine) -> list:
    events = []
    while engine.has_unfinished():
        events += engine.step()
    return events


@pytest.mark.parametrize(
    "prompt, params, match",
    [
        ("", {}, "prompt: is empty"),
        ([], {}, "prompt: is empty"),
        ([5] * 96, {}, "prompt: 96 tokens leave no room for output in max_model_len=96"),
        ("x" * 10_000_000, {}, "prompt: at least .* tokens do not fit in max_model_len=96"),
        ("a\ud800b", {}, "prompt: .*valid Unicode.* character 1"),
        ([5, 259], {}, "prompt: token 1 is 259, not an id below 259"),
        ([5, -1], {}, "prompt: token 1 is -1"),
        ([5, True], {}, "prompt: token 1 is True"),
        ([5, "x"], {}, "prompt: token 1 is 'x'"),
        (jnp.array([[5, 6]]), {}, r"prompt: an array of shape \(1, 2\), token ids have one dimension"),
        (np.array([5.0]), {}, "prompt: token 0 is 5.0, not an id below 259"),
        (b"ab", {}, "prompt: b'ab' is neither text nor token ids"),
        ({"prompt": "a"}, {}, "prompt: {'prompt': 'a'} is neither text nor token ids"),
        (None, {}, "prompt: None is neither text nor token ids"),
        ([5] * 10, {"max_tokens": 87}, "max_tokens: 87 and 10 prompt tokens are more than max_model_len=96"),
        ([5] * 10, {"min_tokens": 87}, "min_tokens: 87 and 10 prompt tokens are more than max_model_len=96"),
        ([5], {"stop_token_ids": (259,)}, "stop_token_ids: 259 is not below the vocabulary's 259"),
    ],
)
def test_refused_by_the_engine(engine, prompt, params, match):
    with pytest.raises(RequestError, match=match):
        engine.generate([prompt], SamplingParams(**params))
    assert not engine.has_unfinished()


def test_arrays_and_iterators_are_prompts(engine):
    ids = [[5, 6, 7], [8, 9, 10]]
    expected = [c.token_ids for c in engine.generate(ids, GREEDY)]
    several = [np.array(ids, np.uint16), jnp.array(ids), map(jnp.array, ids), (tuple(row) for row in ids)]
    for prompts in several:
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
    for prompt in (np.array(ids[0]), jnp.array(ids[0])):
        assert [c.token_ids for c in engine.generate(prompt, GREEDY)] == expected[:1]
    for prompts in ({"a"}, {"prompt": "a"}, b"ab", None, 5, jnp.array(5)):
        with pytest.raises(RequestError, match=r"^prompt: "):
            engine.generate(prompts, GREEDY)
    with pytest.raises(TypeError, match=r"params: {'temperature': 0, 'max_tokens': 1} is not SamplingParams"):
        engine.generate("a", {"temperature": 0, "max_tokens": 1})


def test_a_chat_is_generate_of_its_template(engine, monkeypatch):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match="messages: the model has no chat template"):
        engine.chat(messages)
    template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{% for m in messages %}{{ m.content }};{% endfor %}"
    monkeypatch.setattr(engine, "tokenizer", tiny.tokenizer(template))

    def answers(*args, **template):
        return [c.token_ids for c in engine.chat(*args, **template)]

    one, two, tools = (engine.generate(text, GREEDY)[0].token_ids for text in ("hi;", "hi;ho;", "[f]hi;"))
    longer = [*messages, {"role": "assistant", "content": "ho"}]
    assert answers(messages, GREEDY) == [one] and answers(iter([messages, longer]), [GREEDY] * 2) == [one, two]
    assert answers(messages, GREEDY, tools=[{"name": "f"}]) == [tools] and answers([]) == []
    for wrong in ("hi", messages[0], None, [[]], ["hi"], [messages, [{"role": "user"}]]):
        with pytest.raises(RequestError, match=r"^messages: "):
            engine.chat(wrong)


def test_a_huge_prompt_is_refused_before_it_is_tokenized(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: pytest.fail("tokenized"))
    with pytest.raises(RequestError, match="do not fit in max_model_len=96"):
        engine.make_request("x" * 10_000_000, GREEDY)


def test_refused_before_anything_is_started():
    with tiny.engine(max_num_waiting=1) as engine:
        with pytest.raises(RequestError, match="logprobs: 21 is more than max_logprobs=20"):
            engine.generate([[5]] * 9, [SamplingParams(max_tokens=2)] * 8 + [SamplingParams(logprobs=21)])
        assert engine.stats().num_steps == 0 and not engine.has_unfinished()


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("top_k", None),
        ("temperature", None),
        ("ignore_eos", "no"),
        ("stop", ("",)),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("logit_bias", np.zeros(2)),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: True}),
        ("logit_bias", {5: 100.1}),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", 5),
        ("allowed_token_ids", "12"),
        ("bad_words", (" ",)),
        ("bad_words", (5,)),
        ("presence_penalty", 2.5),
        ("frequency_penalty", None),
        ("repetition_penalty", 0),
        ("truncate_prompt_tokens", 0),
        ("n", 0),
        ("n", True),
        ("n", None),
        ("stop_token_ids", (-1,)),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("stream_interval", 0),
        ("stream_max_delay_s", -1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"^{field}: ") as error:
        SamplingParams(**{field: value})
    assert error.value.field == field


def test_numpy_numbers_and_no_stops_are_taken():
    given: dict[str, Any] = {"temperature": np.float32(0.5), "max_tokens": np.int64(3), "stop": None}
    params = SamplingParams(**given, stop_token_ids=tuple(np.array([4])))
    assert params == SamplingParams(temperature=0.5, max_tokens=3, stop_token_ids=(4,))


def test_min_tokens_stop_ids_and_eos(engine):
    (free,) = engine.generate([PROMPT], GREEDY)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,), ignore_eos=True)
    (stopped,) = engine.generate([PROMPT], params)
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    params = SamplingParams(temperature=0, max_tokens=12, min_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
    (later,) = engine.generate([PROMPT], params)
    assert len(later.token_ids) >= 8 and stop not in later.token_ids[:8]


def test_max_model_len_ends_a_generation(engine):
    (completion,) = engine.generate([PROMPT], SamplingParams(temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == 96 - len(PROMPT)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(engine, include):
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "skip_special_tokens": False}
    (free,) = engine.generate([PROMPT], SamplingParams(**params))
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]  # the tiny tokenizer has one token a byte
    at = free.text.index(stop)
    (out,) = engine.generate(
        [PROMPT], SamplingParams(**params, stop=(stop, "not there"), include_stop_str_in_output=include)
    )
    assert out.text == free.text[: at + len(stop) * include]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert len(out.token_ids) < len(free.token_ids)
    assert engine.stats().num_pages_held == 0


def test_a_seed_repeats_whatever_the_batch(engine):
    params = [SamplingParams(seed=s, temperature=1.3, top_p=0.9, top_k=40, max_tokens=12) for s in range(6)]
    alone = [engine.generate([PROMPT], p)[0].token_ids for p in params]
    together = [c.token_ids for c in engine.generate([PROMPT] * 6, params)]
    assert alone == together
    assert len({tuple(t) for t in alone}) > 1


def test_a_seed_repeats_on_a_mesh(engine):
    params = SamplingParams(seed=5, temperature=1.1, top_p=0.95, max_tokens=16, ignore_eos=True)
    with tiny.engine(mesh="stage=2,tensor=2") as sharded:
        assert sharded.generate([PROMPT], params)[0].token_ids == engine.generate([PROMPT], params)[0].token_ids


def test_abort_at_any_moment(engine):
    expected = engine.generate([PROMPT], GREEDY)[0].token_ids
    for steps in range(6):
        ids = []
        for i in range(5):
            request = engine.make_request(PROMPT, GREEDY, request_id=f"{steps}-{i}")
            engine.add_request(request)
            ids.append(request.request_id)
        events = [e for _ in range(steps) for e in engine.step()]
        assert engine.abort(ids[1]) and engine.abort(ids[4])
        assert not engine.abort(ids[1]) and not engine.abort("unknown")
        events += drain(engine)
        last = {e.request_id: e for e in events}
        assert [last[i].finish_reason for i in ids] == ["length", "abort", "length", "length", "abort"]
        for i in (0, 2, 3):
            assert [e.token_id for e in events if e.request_id == ids[i]] == expected
        assert engine.stats().num_pages_held == 0


def test_deadline_and_duplicate_and_full_queue():
    with tiny.engine(max_num_waiting=2, max_num_seqs=1) as engine:
        engine.add_request(engine.make_request(PROMPT, GREEDY, request_id="a"))
        with pytest.raises(RequestError, match="request_id: 'a' is already in use"):
            engine.add_request(engine.make_request(PROMPT, GREEDY, request_id="a"))
        engine.step()
        late = engine.make_request(PROMPT, GREEDY, request_id="late", deadline=time.monotonic() + 0.01)
        engine.add_request(late)
        engine.add_request(engine.make_request(PROMPT, GREEDY, request_id="b"))
        with pytest.raises(QueueFullError, match="2 requests are waiting, max_num_waiting=2"):
            engine.add_request(engine.make_request(PROMPT, GREEDY))
        time.sleep(0.02)
        last = {e.request_id: e.finish_reason for e in drain(engine)}
        assert last == {"a": "length", "b": "length", "late": "deadline"}
        # generate() feeds a queue that is shorter than its list
        assert len(engine.generate([PROMPT] * 9, GREEDY)) == 9


def test_streams_interleave_and_a_closed_one_is_aborted(engine):
    expected = engine.generate([PROMPT], GREEDY)[0].token_ids
    one, two = engine.stream(PROMPT, GREEDY), engine.stream(PROMPT, GREEDY)
    first = [next(one).token_id, next(two).token_id, next(one).token_id]
    two.close()
    rest = [e.token_id for e in one]
    assert [first[0], first[2], *rest] == expected and first[1] == expected[0]
    assert drain(engine) == [] and engine.stats().num_pages_held == 0


@pytest.mark.parametrize("where", ["forward", "read"])
def test_ctrl_c_in_a_step_ends_generate_and_leaves_the_engine_whole(engine, monkeypatch, where):
    expected = [c.token_ids for c in engine.generate(tiny.prompts(7), GREEDY)]
    original = getattr(engine.loop.runner, where)
    calls = 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(engine.loop.runner, where, interrupted)
    other = engine.stream(PROMPT, GREEDY)
    first = next(other).token_id
    with pytest.raises(KeyboardInterrupt):
        engine.generate(tiny.prompts(7), GREEDY)
    assert calls == 5 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [first, *(e.token_id for e in other)] == expected[2]
    assert [c.token_ids for c in engine.generate(tiny.prompts(7), GREEDY)] == expected
    assert engine.stats().num_pages_held == 0


def test_after_an_error_in_a_step_every_call_says_so(monkeypatch):
    with tiny.engine() as engine:
        stream = engine.stream(PROMPT, GREEDY)
        next(stream)
        monkeypatch.setattr(engine.loop.runner, "read", lambda handle: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([PROMPT], GREEDY)
        for call in (lambda: next(stream), lambda: engine.generate([PROMPT], GREEDY), engine.step):
            with pytest.raises(RuntimeError, match=r"the engine failed in an earlier step.*ZeroDivisionError"):
                call()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([PROMPT], GREEDY)


def test_whatever_a_step_compiles_is_counted(monkeypatch):
    with tiny.engine() as engine:
        engine.generate([PROMPT], GREEDY)
        assert engine.stats().recompilations_after_ready == 0
        commit = engine.loop.scheduler.commit
        monkeypatch.setattr(
            engine.loop.scheduler, "commit", lambda batch, tokens: commit(batch, np.asarray(jnp.sort(tokens)))
        )
        engine.generate([PROMPT], GREEDY)
        assert engine.stats().recompilations_after_ready > 0


def test_priority_is_served_first():
    with tiny.engine(max_num_seqs=1, prefix_caching=False) as engine:
        for name, priority in (("first", 0), ("low", 5), ("high", -1)):
            engine.add_request(engine.make_request(PROMPT, GREEDY, request_id=name, priority=priority))
            if name == "first":
                engine.step()
        ended = [e.request_id for e in drain(engine) if e.finish_reason]
        assert ended == ["first", "high", "low"]


def test_a_closed_engine_leaves_no_arrays_and_no_programs():
    def left() -> tuple[int, int]:
        engine = tiny.engine()
        engine.generate([PROMPT], GREEDY)
        engine.close()
        engine.close()
        del engine
        gc.collect()
        return len(jax.live_arrays()), len(jax.devices()[0].client.live_executables())

    tiny.params()
    gc.collect()
    before = len(jax.live_arrays())
    arrays, programs = left()  # also those that JAX compiles once, for operations outside of steps
    assert arrays == before
    arrays, programs_again = left()
    assert arrays == before
    assert programs_again <= programs


@pytest.mark.parametrize(
    "options, match",
    [
        ({"mesh": "tensor=3"}, "num_kv_heads=4 is not divisible by tensor=3"),
        ({"mesh": "stage=5"}, "num_layers=4 is fewer than stage=5"),
        ({"mesh": "tensor=4,stage=4"}, "needs 16 devices, there are 8"),
        ({"mesh": "tensr=2"}, "mesh: 'tensr=2'"),
        ({"mesh": "tensor=0"}, "'0' is not a positive integer"),
        ({"dtype": "float16"}, "dtype='float16' is not one of auto, float32, bfloat16"),
        ({"max_model_len": 257}, "max_model_len=257 is more than the model's max_position_embeddings=256"),
        ({"num_pages": 23}, "num_pages=23 of 4 hold 92 tokens, fewer than max_model_len=96"),
        ({"num_pages": None, "memory_fraction": 1e-9}, "memory_fraction=1e-09 leaves .* fewer than max_model_len=96"),
        ({"memory_fraction": 0.5}, "num_pages=96 and memory_fraction=0.5: give one of them"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"prefill_sizes": (8, 4)}, r"prefill_sizes=\(8, 4\) must be ascending"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        tiny.engine(**options)


def test_the_models_default_sampling_is_that_of_requests_that_do_not_say():
    defaults = {"temperature": 0.0, "max_tokens": 3}
    with tiny.engine(sampling_defaults=defaults) as engine:
        assert engine.default_sampling_params() == SamplingParams(**defaults)
        assert engine.default_sampling_params(max_tokens=5, top_k=2) == SamplingParams(
            temperature=0, max_tokens=5, top_k=2
        )
        (completion,) = engine.generate([PROMPT])
        events = list(engine.stream(PROMPT))
    with tiny.engine() as engine:
        (expected,) = engine.generate([PROMPT], SamplingParams(**defaults))
    assert completion.token_ids == [e.token_id for e in events] == expected.token_ids
    with pytest.raises(ValueError, match=r"model's default top_p: .*generation_config='none'"):
        tiny.engine(sampling_defaults={"top_p": 7.0})


def test_text_that_becomes_a_token_above_the_embedding_is_refused():
    config = replace(tiny.CONFIG, vocab_size=100)
    params = init_params(config, jax.random.key(0))
    options: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 1, "num_pages": 8, "page_size": 4}
    with Engine.from_params(config, params, tiny.tokenizer(), prefill_sizes=(8,), **options) as engine:
        token = max(tiny.tokenizer().encode("aÿ"))
        with pytest.raises(RequestError, match=f"prompt: its token {token} is not below the model's vocabulary 100"):
            engine.generate("aÿ", GREEDY)
        low = next(c for c in map(chr, range(32, 127)) if max(tiny.tokenizer().encode(c)) < 100)
        assert len(engine.generate(low, GREEDY)[0].token_ids) == 12


def test_parameters_that_do_not_fit_are_refused():
    params = tiny.params()
    with pytest.raises(ValueError, match=r"params.final_norm has shape \(16,\), expected \(32,\)"):
        Engine.from_params(tiny.CONFIG, replace(params, final_norm=params.final_norm[:16]))
    with pytest.raises(ValueError, match=r"params.head is missing, expected shape \(259, 32\)"):
        Engine.from_params(tiny.CONFIG, replace(params, head=None))
    with pytest.raises(ValueError, match=r"params.layers.4.attn_norm is not a parameter"):
        Engine.from_params(tiny.CONFIG, replace(params, layers=params.layers + params.layers[:1]))
    for wrong in ({}, None):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"params: {kind} is neither jaxserve.model.params.Params nor"):
            Engine.from_params(tiny.CONFIG, wrong)  # pyright: ignore[reportArgumentType]


def test_sampling_that_was_not_compiled_is_refused():
    with tiny.engine(samplings=("greedy",), max_num_seqs=4, decode_sizes=(2, 4)) as engine:
        assert engine.scheduler_config.decode_sizes == (2, 4)
        assert len(engine.generate([PROMPT], GREEDY)[0].token_ids) == 12
        for field, value in {"temperature": 0.5, "logprobs": 3, "min_tokens": 2}.items():
            with pytest.raises(RequestError, match=f"{field}: {value} needs sampling '.*', this engine has 'greedy'"):
                engine.make_request(PROMPT, replace(GREEDY, **{field: value}))


@pytest.mark.parametrize("samplings", [(), ("greedy", "lucky")])
def test_unknown_samplings_are_named(samplings: tuple[Any, ...]):
    with pytest.raises(ValueError, match=r"samplings=.* must be some of greedy, random, any"):
        tiny.engine(samplings=samplings)
