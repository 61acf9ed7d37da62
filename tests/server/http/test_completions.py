"""``/v1/completions`` against an engine whose answers are known."""

from jaxserve.sampling_params import SamplingParams
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_text
from tests.server.http.conftest import Web, web

COMPLETIONS = "/v1/completions"


def texts(answer: dict) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


async def test_the_forms_of_a_prompt(site: Web):
    a, b = [97, 98, 99], [98]
    forms = {
        "abc": ["abc"],
        ("abc", "b"): ["abc", "b"],
        tuple(a): [a],
        (tuple(a), tuple(b)): [a, b],
        ("abc", tuple(b)): ["abc", b],
    }
    for given, prompts in forms.items():
        sent = given if isinstance(given, str) else [list(p) if isinstance(p, tuple) else p for p in given]
        answer = await site.post(COMPLETIONS, prompt=sent, max_tokens=4)
        assert texts(answer) == [expected_text(p, 4) for p in prompts]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts)))


async def test_answer_has_openais_shape(site: Web):
    answer = await site.post(COMPLETIONS, model="fake", prompt="abc", max_tokens=5)
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("text_completion", "fake") and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": expected_text("abc", 5), "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_default_length_is_sixteen_or_what_fits(site: Web):
    assert texts(await site.post(COMPLETIONS, prompt="abc")) == [expected_text("abc", 16)]
    prompt = "a" * 395  # of 400
    assert texts(await site.post(COMPLETIONS, prompt=prompt)) == [expected_text(prompt, 5)]
    status, error = await site.refused(COMPLETIONS, prompt="a" * 400)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")


async def test_n_and_several_prompts_number_their_choices(site: Web):
    answer = await site.post(COMPLETIONS, prompt=["abc", "b"], max_tokens=2, n=2)
    # The fake engine starts choice k at token k.
    expected = [expected_text(p, 3)[k : k + 2] for p in ("abc", "b") for k in (0, 1)]
    assert texts(answer) == expected
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 8
    chunks = await site.stream(COMPLETIONS, prompt=["abc", "b"], max_tokens=2, n=2)
    streamed = ["", "", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == expected


async def test_stream_is_the_answer_in_pieces(site: Web):
    chunks = await site.stream(COMPLETIONS, prompt="abc", max_tokens=30)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected_text("abc", 30)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({chunk["id"] for chunk in chunks}) == 1 and all("usage" not in chunk for chunk in chunks)


async def test_stream_options(site: Web):
    *chunks, last = await site.stream(COMPLETIONS, prompt="abc", max_tokens=3, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = await site.stream(COMPLETIONS, prompt="abc", max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3 == last["usage"]["completion_tokens"]
    chunks = await site.stream(COMPLETIONS, prompt="abc", max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-1] == 3 and all(c["choices"] for c in chunks)
    for bad in ({"foo": 1}, {"include_usage": 1}, {"include_obfuscation": True}, []):
        status, error = await site.refused(COMPLETIONS, prompt="a", stream=True, stream_options=bad)
        assert status == 400 and error["param"].startswith("stream_options")
    status, error = await site.refused(COMPLETIONS, prompt="a", stream_options={"include_usage": True})
    assert status == 400 and error["param"] == "stream_options"


async def test_echo(site: Web):
    for prompt, text in (("abc", "abc"), ([97, 98, 99], "abc")):
        answer = await site.post(COMPLETIONS, prompt=prompt, max_tokens=3, echo=True)
        assert texts(answer) == [text + expected_text(prompt, 3)]
        chunks = await site.stream(COMPLETIONS, prompt=prompt, max_tokens=3, echo=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text + expected_text(prompt, 3)


async def test_max_tokens_0_makes_nothing(site: Web):
    for echo, text in ((True, "abc"), (False, "")):
        answer = await site.post(COMPLETIONS, prompt="abc", max_tokens=0, echo=echo, logprobs=1 if not echo else None)
        assert texts(answer) == [text] and answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        chunks = await site.stream(COMPLETIONS, prompt="abc", max_tokens=0, echo=echo)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    status, error = await site.refused(COMPLETIONS, prompt="abc", max_tokens=0, min_tokens=1)
    assert status == 400 and error["param"] == "min_tokens"


async def test_logprobs(site: Web):
    answer = await site.post(COMPLETIONS, prompt="abc", max_tokens=3, logprobs=2)
    text = expected_text("abc", 3)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": list(text),
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{c: -0.5, chr(ord(c) + 1): -1.5} for c in text],
        "text_offset": [0, 1, 2],
    }
    chunks = await site.stream(COMPLETIONS, prompt="abc", max_tokens=3, logprobs=2)
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: [v for piece in pieces for v in piece[name]] for name in logprobs} == logprobs
    # None asked for but the sampled one's.
    answer = await site.post(COMPLETIONS, prompt="abc", max_tokens=1, logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{text[0]: -0.5}]


APPLIED = {
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.25,
    "seed": 11,
    "stop": ["xyz", "q"],
    "stop_token_ids": [200],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 2.5, "7": -100},
    "allowed_token_ids": [1, 2],
    "bad_words": ["no"],
    "truncate_prompt_tokens": 2,
    "n": 2,
    "max_tokens": 9,
    "logprobs": 3,
    "stream_interval": 3,
    "stream_max_delay_s": 0.25,
}


async def test_every_sampling_field_reaches_the_engine(site: Web):
    for name, value in APPLIED.items():
        await site.post(COMPLETIONS, **{"prompt": "abc", "max_tokens": 3, name: value})
        params = site.engine.requests[-1].params
        value = {5: 2.5, 7: -100.0} if name == "logit_bias" else value
        assert params == SamplingParams(**{"max_tokens": 3, name: tuple(value) if isinstance(value, list) else value})


def test_no_sampling_field_was_forgotten():
    later = {"prompt_logprobs", "structured_outputs"}  # tested where they are answered
    assert set(APPLIED) == set(SamplingParams.__dataclass_fields__) - later


async def test_stop_may_be_a_string_and_the_reason_is_told(site: Web):
    text = expected_text("abc", 3)
    answer = await site.post(COMPLETIONS, prompt="abc", stop_token_ids=[ord(text[2])])
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", ord(text[2]))
    await site.post(COMPLETIONS, prompt="abc", max_tokens=1, stop="x")
    assert site.engine.requests[-1].params.stop == ("x",)


async def test_the_models_own_sampling_holds_where_nothing_is_said(site: Web):
    site.engine.sampling_defaults["temperature"] = 0.25
    await site.post(COMPLETIONS, prompt="abc", max_tokens=1)
    assert site.engine.requests[-1].params.temperature == 0.25
    await site.post(COMPLETIONS, prompt="abc", max_tokens=1, temperature=0)
    assert site.engine.requests[-1].params.temperature == 0


async def test_priority_and_request_id(site: Web):
    answer = await site.post(COMPLETIONS, prompt=["abc", "b"], max_tokens=1, priority=-3, request_id="mine")
    assert answer["id"] == "mine"
    assert [r.request_id for r in site.engine.requests] == ["mine-0", "mine-1"]
    assert {r.priority for r in site.engine.requests} == {-3}


async def test_add_special_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.prefix_ids = (256,)
    async with web(FakeEngine(tokenizer=tokenizer)) as site:
        for add, expected in ((None, (256, 97)), (True, (256, 97)), (False, (97,))):
            await site.post(COMPLETIONS, prompt="a", max_tokens=1, add_special_tokens=add)
            assert site.engine.requests[-1].prompt_token_ids == expected
