"""Bytes that no client of ours would send, to every method: each call ends with a status that says whose fault it was,
nothing is logged as the server's error, and it goes on serving."""

import asyncio
import logging
import random
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from jaxserve.server.v1 import inference_pb2 as pb
from tests.server.conftest import TIMEOUT_S, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_text

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
MESSAGES = {
    "GenerateRequest": pb.GenerateRequest(request_id="a", text="abc", sampling=pb.SamplingParams(max_tokens=5, n=2)),
    "EmbedRequest": pb.EmbedRequest(text="abc"),
    "TokenizeRequest": pb.TokenizeRequest(text="abc"),
    "DetokenizeRequest": pb.DetokenizeRequest(token_ids=[65, 66, 67]),
}


def attempts(method: MethodDescriptor, r: random.Random) -> Iterator[bytes]:
    """Random bytes, cut and changed messages, groups in groups, and a length that is not there."""
    valid = MESSAGES.get(method.input_type.name, pb.AbortRequest(request_id="abc")).SerializeToString()
    yield b""
    yield b"\x0b" * 20_000  # groups that begin and never end
    yield b"\x0a\xff\xff\xff\xff\x0f"  # a field of 4 GiB
    for _ in range(12):
        yield r.randbytes(r.randint(1, 60))
    for _ in range(30):
        changed = bytearray(valid)
        for _ in range(r.randint(1, 3)):
            changed[r.randrange(len(changed))] = r.randrange(256)
        yield bytes(changed[: r.randint(1, len(changed))] if r.random() < 0.3 else changed)
    for _ in range(5):  # good fields, then fields that nobody knows
        yield valid + r.randbytes(r.randint(1, 20))


@pytest.mark.parametrize("name", METHODS)
async def test_bytes_are_answered_or_refused(name: str, caplog: pytest.LogCaptureFixture):
    method, r = METHODS[name], random.Random(name)
    engine = FakeEngine(tokenizer=byte_tokenizer(), max_model_len=64)
    path = f"/{method.containing_service.full_name}/{method.name}"
    parse = GetMessageClass(method.input_type).FromString
    async with serving(engine) as s, grpc.aio.insecure_channel(s.target) as channel:

        async def status(data: bytes) -> Code:
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    if method.client_streaming:
                        stream = channel.stream_stream(path)(iter([data]))
                    elif method.server_streaming:
                        stream = channel.unary_stream(path)(data)
                    else:
                        await channel.unary_unary(path)(data)
                        return Code.OK
                    async for _ in stream:
                        pass
            except grpc.aio.AioRpcError as error:
                return error.code()
            return Code.OK

        seen = set()
        for data in attempts(method, r):
            try:
                parse(data)
                if method.name in ONLY_MALFORMED:
                    continue
                allowed = {Code.OK, *CLIENTS_FAULT}
            except DecodeError:
                allowed = {Code.UNIMPLEMENTED if name == "Health.List" else Code.INVALID_ARGUMENT}
            found = await status(data)
            assert found in allowed, (data.hex(), found)
            seen.add(found)
        if name == "Health.List":  # not there
            assert seen == {Code.UNIMPLEMENTED}
        else:
            assert Code.INVALID_ARGUMENT in seen
            assert len(seen) > 1 or method.name in ONLY_MALFORMED
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert await s.is_idle()
        assert "".join([c.text async for c in s.client.generate("ab", max_tokens=9)]) == expected_text("ab", 9)
