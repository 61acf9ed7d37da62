"""Bytes that no client of ours would send, to every method, alone and among good messages of one stream: each call ends
with a status that says whose fault it was, nothing is left of it or logged as the server's error, and others go on.
"""

import asyncio
import gc
import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from jaxserve.server.client import batch_request
from jaxserve.server.v1 import inference_pb2 as pb
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_text, expected_tokens

Code = grpc.StatusCode
METHODS = {
    f"{service.name}.{method.name}": method
    for file in (pb, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Whatever is a message is a good request to these: the server would drain, and watching health has no end.
ONLY_MALFORMED = {"Drain", "Watch"}
# What a request can be told; DEADLINE_EXCEEDED by its own time limit.
CLIENTS_FAULT = {
    *(Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION, Code.PERMISSION_DENIED),
    *(Code.RESOURCE_EXHAUSTED, Code.UNIMPLEMENTED, Code.OUT_OF_RANGE, Code.DEADLINE_EXCEEDED),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}{{ t }}{% endfor %}<tool_call>"
CHAT = pb.ChatMessages(
    messages=[
        pb.ChatMessage(role="user", content="a"),
        pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="1", name="f", arguments="{}")]),
        pb.ChatMessage(role="tool", content="b", tool_call_id="1"),
    ],
    tools=[pb.Tool(name="f", description="d", parameters='{"type": "object"}')],
    tool_choice=pb.TOOL_CHOICE_REQUIRED,
    chat_template_kwargs='{"a": 1}',
    documents=['{"b": 2}'],
)
MESSAGES = {
    "GenerateRequest": [
        pb.GenerateRequest(request_id="a", text="abc", sampling=pb.SamplingParams(max_tokens=5, n=2)),
        pb.GenerateRequest(request_id="b", messages=CHAT, sampling=pb.SamplingParams(max_tokens=5)),
    ],
    "EmbedRequest": [pb.EmbedRequest(text="abc")],
    "TokenizeRequest": [pb.TokenizeRequest(text="abc"), pb.TokenizeRequest(messages=CHAT)],
    "DetokenizeRequest": [pb.DetokenizeRequest(token_ids=[65, 66, 67])],
}
LIMIT = 2000  # bytes of a message, where one is too large
GARBAGE = (b"\xff", b"\x0b" * 1000, b"\x0a\xff\xff\xff\xff\x0f", batch_request("x", "abc").SerializeToString()[:-1])


def path_of(method: MethodDescriptor) -> str:
    assert method.containing_service is not None
    return f"/{method.containing_service.full_name}/{method.name}"


async def answered(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> tuple[Code, str]:
    """How a call with this one message ends: the status and its text."""
    path = path_of(method)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if method.client_streaming:
                stream = channel.stream_stream(path)(iter([data]))
            elif method.server_streaming:
                stream = channel.unary_stream(path)(data)
            else:
                await channel.unary_unary(path)(data)
                return Code.OK, ""
            async for _ in stream:
                pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return Code.OK, ""


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What tests before left to the garbage collector is not logged in these, nor gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def logged(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    """What was logged of ``level`` or above; asyncio says there too whose exception nobody took."""
    gc.collect()
    formatter = logging.Formatter("%(name)s %(levelname)s %(message)s")
    return [formatter.format(record) for record in caplog.records if record.levelno >= level]


def attempts(method: MethodDescriptor, r: random.Random) -> Iterator[bytes]:
    """Random bytes, cut and changed messages, groups in groups, and a length that is not there."""
    valids = [m.SerializeToString() for m in MESSAGES.get(method.input_type.name, [pb.AbortRequest(request_id="abc")])]
    yield from (b"", *valids)
    yield b"\x0b" * 20_000  # groups that begin and never end
    yield b"\x0a\xff\xff\xff\xff\x0f"  # a field of 4 GiB
    for _ in range(12):
        yield r.randbytes(r.randint(1, 60))
    for _ in range(30):
        changed = bytearray(r.choice(valids))
        for _ in range(r.randint(1, 3)):
            changed[r.randrange(len(changed))] = r.randrange(256)
        yield bytes(changed[: r.randint(1, len(changed))] if r.random() < 0.3 else changed)
    for _ in range(5):  # good fields, then fields that nobody knows
        yield r.choice(valids) + r.randbytes(r.randint(1, 20))


@pytest.mark.parametrize("name", METHODS)
async def test_bytes_are_answered_or_refused(name: str, caplog: pytest.LogCaptureFixture):
    method, r = METHODS[name], random.Random(name)
    engine = FakeEngine(tokenizer=byte_tokenizer(TEMPLATE), max_model_len=200)
    parse = GetMessageClass(method.input_type).FromString
    async with serving(engine) as s, grpc.aio.insecure_channel(s.target) as channel:
        seen = set()
        for data in attempts(method, r):
            try:
                parse(data)
                if method.name in ONLY_MALFORMED:
                    continue
                allowed = {Code.OK, *CLIENTS_FAULT}
            except DecodeError:
                allowed = {Code.UNIMPLEMENTED if name == "Health.List" else Code.INVALID_ARGUMENT}
            found, _ = await answered(channel, method, data)
            assert found in allowed, (data.hex(), found)
            seen.add(found)
        if name == "Health.List":  # not there
            assert seen == {Code.UNIMPLEMENTED}
        else:
            assert Code.INVALID_ARGUMENT in seen
            assert len(seen) > 1 or method.name in ONLY_MALFORMED
        assert not logged(caplog)
        assert await s.is_idle()
        assert "".join([c.text async for c in s.client.generate("ab", max_tokens=9)]) == expected_text("ab", 9)


async def test_too_large_a_message_is_refused_with_both_sizes(caplog: pytest.LogCaptureFixture):
    async with serving(max_message_bytes=LIMIT) as s, grpc.aio.insecure_channel(s.target) as channel:
        sizes = (LIMIT, LIMIT + 1, 100 * LIMIT)
        calls = [(name, method, size) for name, method in METHODS.items() for size in sizes if name != "Health.List"]
        # At once: gRPC takes a tenth of a second to say so.
        ends = await asyncio.gather(*(answered(channel, method, b"\xff" * size) for _, method, size in calls))
        for (name, _, size), (code, told) in zip(calls, ends):
            if size == LIMIT:
                assert code == Code.INVALID_ARGUMENT, (name, told)
            else:
                assert code == Code.RESOURCE_EXHAUSTED, (name, told)
                assert str(size) in told and str(LIMIT) in told, (name, told)
        assert not logged(caplog, logging.WARNING) and not s.engine.requests
        prompt = "a" * (LIMIT - 100)
        [failure] = [m async for m in s.client.generate_batch([batch_request("x", prompt)])]
        assert "max_model_len" in str(failure)  # another limit: the message was taken


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


ENDS = {
    "half-close": Code.OK,
    "leave": Code.CANCELLED,
    "malformed": Code.INVALID_ARGUMENT,
    "nameless": Code.INVALID_ARGUMENT,
    "oversize": Code.RESOURCE_EXHAUSTED,
}


async def one_stream(channel: grpc.aio.Channel, own: str, end: str) -> Code:
    """Good and refused requests on one stream in any order, then what ends it. All that it answers is checked, and its
    status returned.

    Args:
        own: names its requests, and chooses them.
    """
    r = random.Random(own)
    good: dict[str, tuple[str, int]] = {}  # prompt and number of tokens by id
    bad: dict[str, Code] = {}
    num_after = r.choice([0, 3])
    lets_go = asyncio.Event()

    def message(i: int) -> bytes:
        kind = r.choice(["good", "good", "long", "hot", "empty", "twin"])
        name, prompt = f"{own} {kind} {i}", "abc"[: r.randint(1, 3)] * r.randint(1, 9)
        if kind in ("good", "long"):
            good[name] = prompt, r.randint(1, 9) if kind == "good" or end == "half-close" else 10**5
            return batch_request(name, prompt, max_tokens=good[name][1]).SerializeToString()
        if kind == "twin":
            bad["survivor"] = Code.ALREADY_EXISTS
            return batch_request("survivor", prompt).SerializeToString()
        bad[name] = Code.INVALID_ARGUMENT
        if kind == "empty":
            return batch_request(name, token_ids=[]).SerializeToString()
        return batch_request(name, prompt, temperature=-1.0).SerializeToString()

    async def messages() -> AsyncIterator[bytes]:
        for i in range(r.randint(0, 8)):
            yield message(i)
            await asyncio.sleep(r.choice([0, 0, 0.001, 0.004]))
        if end == "half-close":
            return
        if end == "leave":
            lets_go.set()
            await asyncio.sleep(TIMEOUT_S)
        elif end == "malformed":
            yield r.choice(GARBAGE)
        elif end == "oversize":
            yield batch_request("large", "a" * r.choice([LIMIT, 50 * LIMIT])).SerializeToString()
        else:
            yield pb.GenerateRequest(text="nobody's").SerializeToString()
        for i in range(num_after):
            yield batch_request(f"{own} after {i}", "abc", max_tokens=3).SerializeToString()

    call = channel.stream_stream(
        "/jaxserve.v1.Inference/GenerateBatch", response_deserializer=pb.BatchChunk.FromString
    )(messages())
    if end == "leave":
        asyncio.get_running_loop().create_task(lets_go.wait()).add_done_callback(lambda _: call.cancel())
    tokens: dict[str, list[int]] = {}
    told: dict[str, Code] = {}
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for answer in call:
                if answer.HasField("failure"):
                    told[answer.failure.request_id] = next(c for c in Code if c.value[0] == answer.failure.code)
                else:
                    tokens.setdefault(answer.chunk.request_id, []).extend(answer.chunk.token_ids)
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        assert end != "half-close"
    for name, found in tokens.items():
        prompt, num_tokens = good[name]  # KeyError: of a message after the one that ended the call
        assert found == expected_tokens(prompt, num_tokens)[: len(found)], name
    assert told.items() <= bad.items()
    if end == "half-close":
        assert told == bad
        assert {name: len(found) for name, found in tokens.items()} == {name: n for name, (_, n) in good.items()}
    code, details = await call.code(), await call.details()
    if code == Code.INTERNAL:  # of the client's own gRPC, where it was about to write as the call ended
        assert details == "Internal error from Core" and end != "half-close"
    else:
        assert code == ENDS[end], details
    return code


@pytest.mark.parametrize("end", ENDS)
async def test_one_message_ends_a_stream_and_nothing_of_it_stays(end: str, caplog: pytest.LogCaptureFixture):
    async with (
        serving(endless_engine(), max_message_bytes=LIMIT) as s,
        grpc.aio.insecure_channel(s.target) as channel,
    ):
        survivor = s.client.generate("abc", request_id="survivor")
        text = (await anext(survivor)).text
        await one_stream(channel, "first", "half-close")  # what the first call opens may stay
        tasks_before, files_before = len(asyncio.all_tasks()), num_files()
        for i in range(3):
            codes = await asyncio.gather(*(one_stream(channel, f"{end} {i} {j}", end) for j in range(8)))
            assert ENDS[end] in codes
        await until(lambda: (stats := s.server.engine.stats()) is not None and stats.num_running == 1)
        await until(lambda: len(asyncio.all_tasks()) <= tasks_before and num_files() <= files_before)
        text += (await anext(survivor)).text
        assert text == expected_text("abc", len(text))  # of one stream's failures others see nothing
        await survivor.aclose()
        assert await s.is_idle()
        assert not logged(caplog, logging.WARNING)
