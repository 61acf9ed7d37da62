"""Every sampling field through a real server: what is set arrives as it is, what is refused is refused by name."""

import dataclasses
import math
from typing import Any

import grpc
import grpc.aio
import pytest

from jaxserve.errors import RequestError
from jaxserve.sampling_params import MAX_SEED, SamplingParams, StructuredOutputs
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.server.v1 import inference_pb2_grpc
from tests.server.conftest import endless_engine, serving
from tests.server.fake_engine import expected_tokens

TAKEN = {
    "max_tokens": (1, 7),
    "min_tokens": (0, 3),
    "temperature": (0.0, 0.7, 1e-300),
    "top_p": (0.1, 1.0),
    "top_k": (-1, 0, 40),
    "min_p": (0.0, 0.05, 1.0),
    "seed": (0, 1, MAX_SEED),
    "stop": ((), ("x",), ("né", "\n\n")),
    "stop_token_ids": ((), (0, 255)),
    "include_stop_str_in_output": (False, True),
    "ignore_eos": (False, True),
    "logprobs": (-1, 0, 5),
    "prompt_logprobs": (-1, 0, 3),
    "skip_special_tokens": (False, True),
    "n": (1, 3),
    "presence_penalty": (-2.0, 0.0, 2.0),
    "frequency_penalty": (-2.0, 0.3),
    "repetition_penalty": (1e-3, 1.0, 1.1, 50.0),
    "logit_bias": ({0: 0.0}, {3: 1.5, 256: -100.0}),
    "allowed_token_ids": ((0,), (1, 2, 2)),
    "bad_words": ((), ("word",), (" word", "né")),
    "truncate_prompt_tokens": (1, 8),
    "stream_interval": (1, 7),
    "stream_max_delay_s": (0.0, 2.5),
    "structured_outputs": (
        StructuredOutputs(json='{"type": "object"}'),
        StructuredOutputs(json_object=True),
        StructuredOutputs(regex="a+"),
        StructuredOutputs(choice=("a", "né")),
        StructuredOutputs(grammar="start: /a/"),
    ),
}

REFUSED = {
    "max_tokens": (0, -1),
    "min_tokens": (-1, 10),  # 10 is more than max_tokens below
    "temperature": (-0.1, math.nan, math.inf, -math.inf),
    "top_p": (0.0, -0.5, 1.5, math.nan, math.inf),
    "top_k": (-2,),
    "min_p": (-0.1, 1.1, math.nan),
    "seed": (),  # every value of the wire's type is one
    "stop": (("",), ("a", "")),
    "stop_token_ids": ((-1,),),
    "include_stop_str_in_output": (),
    "ignore_eos": (),
    "logprobs": (-2,),
    "skip_special_tokens": (),
    "n": (0, -1),
    "presence_penalty": (2.1, -2.1, math.nan),
    "frequency_penalty": (2.1, -2.1, math.nan),
    "repetition_penalty": (0.0, -1.0, math.nan, math.inf),
    "logit_bias": ({3: 100.5}, {0: -101.0}, {3: math.nan}, {-1: 1.0}),
    "allowed_token_ids": ((), (1, -2)),
    "bad_words": (("",), ("a", " ")),
    "prompt_logprobs": (-2,),
    "truncate_prompt_tokens": (0, -1),
    "stream_interval": (0, -1),
    "stream_max_delay_s": (-0.1, math.nan, math.inf),
    "structured_outputs": (),  # what is wrong with one is told by the engine's door, or already here
}

NOT_ON_THE_WIRE = {
    "max_tokens": (2**31, 1.5, "3"),
    "temperature": ("hot",),
    "seed": (-1, 2**64),
    "stop": ("\ud800",),
    "stop_token_ids": ((2**31,),),
    "logit_bias": ({"a": 1.0},),
    "structured_outputs": ({}, {"regex": "a", "grammar": "b"}, {"regex": 3}, {"choice": ()}, {"what": "a"}, "a"),
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_the_tables_know_every_field():
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert set(TAKEN) == names and set(REFUSED) == names


async def test_every_taken_value_arrives_as_it_was_set():
    async with serving() as s:
        for name, values in TAKEN.items():
            for value in values:
                sampling: dict[str, Any] = {"max_tokens": 4} | {name: value}
                [_ async for _ in s.client.generate("a", **sampling)]
                assert s.engine.requests[-1].params == SamplingParams(**sampling), (name, value)
                got = getattr(s.engine.requests[-1].params, name)
                assert got == value and type(got) is type(value), (name, value)


async def test_choices_are_told_apart():
    async with serving() as s:
        chunks = [chunk async for chunk in s.client.generate("a", n=3, max_tokens=5, request_id="r", logprobs=1)]
        tokens = {k: [i for chunk in chunks if chunk.choice == k for i in chunk.token_ids] for k in range(3)}
        assert tokens == {k: expected_tokens("a", 5 + k)[k:] for k in range(3)}
        assert {chunk.request_id for chunk in chunks} == {"r"}
        ends = [chunk for chunk in chunks if chunk.finish_reason]
        assert sorted(chunk.choice for chunk in ends) == [0, 1, 2]
        assert all(c.finish_reason == "length" and c.usage and c.usage.completion_tokens == 5 for c in ends)
        assert await s.is_idle()


async def test_a_dropped_stream_ends_all_its_choices():
    async with serving(endless_engine()) as s:
        async for chunk in s.client.generate("a", n=3):
            if chunk.choice == 2:
                break
        assert await s.is_idle()
        call = s.client.generate("a", n=2, request_id="r")
        await anext(call)
        await s.client.abort("r")
        rest = [chunk async for chunk in call]
        assert sorted(c.choice for c in rest if c.finish_reason == "abort") == [0, 1]


async def test_a_schema_may_be_a_mapping():
    async with serving() as s:
        [_ async for _ in s.client.generate("a", structured_outputs={"json": {"type": "integer"}}, max_tokens=1)]
        assert s.engine.requests[-1].params.structured_outputs == StructuredOutputs(json='{"type": "integer"}')


async def test_a_single_stop_may_be_a_string():
    async with serving() as s:
        [_ async for _ in s.client.generate("a", stop="x", max_tokens=1)]
        assert s.engine.requests[-1].params.stop == ("x",)


async def test_unset_is_the_default_and_not_zero():
    async with serving() as s:
        [_ async for _ in s.client.generate("a", temperature=None)]
        assert s.engine.requests[-1].params == SamplingParams()
        [_ async for _ in s.client.generate("a", temperature=0.0)]
        assert s.engine.requests[-1].params == SamplingParams(temperature=0.0)

        # The same on the bare wire: no sampling message, an empty one, and one with an explicit zero.
        async with grpc.aio.insecure_channel(s.target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            for request in (pb.GenerateRequest(text="a"), pb.GenerateRequest(text="a", sampling=pb.SamplingParams())):
                [_ async for _ in stub.Generate(request)]
                assert s.engine.requests[-1].params == SamplingParams()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                explicit = pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=0))
                [_ async for _ in stub.Generate(explicit)]
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            for structured in (pb.StructuredOutputs(), pb.StructuredOutputs(choice=pb.Texts())):
                with pytest.raises(grpc.aio.AioRpcError, match="structured_outputs: ") as caught:
                    sampling = pb.SamplingParams(structured_outputs=structured)
                    [_ async for _ in stub.Generate(pb.GenerateRequest(text="a", sampling=sampling))]
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_unset_is_the_models_default_where_it_has_one():
    async with serving() as s:
        s.engine.sampling_defaults = {"temperature": 0.6, "top_p": 0.9}
        [_ async for _ in s.client.generate("a", temperature=0.0, max_tokens=2)]
        assert s.engine.requests[-1].params == SamplingParams(temperature=0.0, top_p=0.9, max_tokens=2)
        [_ async for _ in s.client.generate("a")]
        assert s.engine.requests[-1].params == SamplingParams(temperature=0.6, top_p=0.9)


async def test_every_refused_value_is_refused_by_name():
    async with serving() as s:
        for name, values in REFUSED.items():
            for value in values:
                sampling: dict[str, Any] = {"max_tokens": 4} | {name: value}
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    [_ async for _ in s.client.generate("a", **sampling)]
                error = caught.value
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, value, error)
                assert (error.details() or "").startswith(f"{name}: "), (name, value, error)
                assert dict(error.trailing_metadata() or ())["jaxserve-field"] == name
        assert s.engine.requests == []


@pytest.mark.parametrize(("name", "value"), cases(NOT_ON_THE_WIRE))
async def test_what_the_wire_cannot_hold_is_refused_by_the_client(name, value):
    async with serving() as s:
        with pytest.raises(RequestError) as caught:
            s.client.generate("a", **{name: value})
        assert caught.value.field == name


async def test_unknown_field_is_refused_by_the_client():
    async with serving() as s:
        with pytest.raises(RequestError, match="tempreature: unknown"):
            s.client.generate("a", tempreature=1.0)
