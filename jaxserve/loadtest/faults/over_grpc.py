"""gRPC clients. ``KINDS`` names them."""

import asyncio
import random
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from jaxserve.loadtest.faults.known import Kind, Known, Part, Site, WrongAnswerError, expect, read, some
from jaxserve.loadtest.faults.tap import Tap
from jaxserve.sampling_params import ALL_LOGPROBS
from jaxserve.server.client import AsyncClient, batch_request
from jaxserve.server.client_codec import Chunk, RequestFailure, generate_request, read_chunk
from jaxserve.server.v1 import inference_pb2 as pb

Code = grpc.StatusCode
METHOD = "/jaxserve.v1.Inference/Generate"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SMALL_WINDOW = [  # by itself gRPC takes megabytes that nobody reads
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2**16),
    ("grpc.use_local_subchannel_pool", 1),
]
NO_FRAME = b"\xff" * 64  # a frame of 16 MiB, of an unknown type, on a stream that never was


def generate(client: AsyncClient, known: Known, **options: Any) -> AsyncGenerator[Chunk]:
    return client.generate(token_ids=known.token_ids, **known.sampling, **options)


async def whole(site: Site, known: Known, r: random.Random) -> str:
    async with aclosing(generate(site.client, known)) as chunks:
        return await read(chunks, known)


async def slow(site: Site, known: Known, r: random.Random) -> str:
    async with aclosing(generate(site.client, known)) as chunks:
        return await read(chunks, known, pause_s=0.02 * r.random())


async def leave(site: Site, known: Known, r: random.Random) -> str:
    async with aclosing(generate(site.client, known)) as chunks:
        return await read(chunks, known, leave_after=some(known, r))


async def cancel(site: Site, known: Known, r: random.Random) -> str:
    """At any moment, mostly before the first token where many wait."""
    reading = asyncio.create_task(whole(site, known, r))
    await asyncio.wait((reading,), timeout=0.2 * r.random())
    reading.cancel()
    await asyncio.wait((reading,))
    return "cancelled" if reading.cancelled() else reading.result()


async def abort(site: Site, known: Known, r: random.Random) -> str:
    request_id = r.randbytes(8).hex()
    async with aclosing(generate(site.client, known, request_id=request_id)) as chunks:

        async def aborting() -> AsyncGenerator[Part]:
            is_first = True
            async for chunk in chunks:
                yield chunk
                if is_first:
                    is_first = False
                    try:
                        await site.client.abort(request_id)
                    except grpc.aio.AioRpcError as error:
                        expect(error.code(), Code.NOT_FOUND)  # it has ended by itself

        return await read(aborting(), known)


async def deadline(site: Site, known: Known, r: random.Random) -> str:
    try:
        async with aclosing(generate(site.client, known, timeout_s=r.uniform(0.001, 0.2))) as chunks:
            return await read(chunks, known)
    except grpc.aio.AioRpcError as error:
        return expect(error.code(), Code.DEADLINE_EXCEEDED)


async def batch(site: Site, known: Known, r: random.Random) -> str:
    """Three on one call, of which one is refused; the client's half of the call is closed while they run."""
    requests = [batch_request(name, token_ids=known.token_ids, **known.sampling) for name in ("a", "b")]
    requests.insert(r.randrange(3), batch_request("bad", token_ids=()))
    parts: dict[str, list[Chunk]] = {"a": [], "b": []}
    failures: list[RequestFailure] = []
    ids = {request.request_id: r.randbytes(8).hex() for request in requests}  # an engine knows them all
    names = {request_id: name for name, request_id in ids.items()}
    for request in requests:
        request.request_id = ids[request.request_id]
    async with aclosing(site.client.generate_batch(requests)) as messages:
        async for message in messages:
            if isinstance(message, Chunk):
                parts[names[message.request_id]].append(message)
            else:
                failures.append(message)

    async def replay(chunks: list[Chunk]) -> AsyncGenerator[Part]:
        for chunk in chunks:
            yield chunk

    for chunks in parts.values():
        await read(replay(chunks), known)
    expect([names[failure.request_id] for failure in failures], ["bad"])
    return "whole"


async def choices(site: Site, known: Known, r: random.Random) -> str:
    """Two of one prompt."""
    ended = set()
    async with aclosing(generate(site.client, known, n=2, logprobs=3)) as chunks:

        async def noting() -> AsyncGenerator[Part]:
            async for chunk in chunks:
                expect(tuple(entry.token_id for entry in chunk.logprobs), chunk.token_ids)
                if chunk.finish_reason is not None:
                    ended.add(chunk.choice)
                yield chunk

        outcome = await read(noting(), known)
    expect(ended, {0, 1})
    return outcome


async def impatient(site: Site, known: Known, r: random.Random) -> str:
    """Takes a refusal for an answer, where the others ask again."""
    request = generate_request(None, known.token_ids, None, known.sampling, None, None, None)
    method = site.channel.unary_stream(
        METHOD,
        pb.GenerateRequest.SerializeToString,
        lambda data: read_chunk(pb.GenerateChunk.FromString(data)),
    )
    try:
        return await read(method(request).__aiter__(), known)
    except grpc.aio.AioRpcError as error:
        return expect(error.code(), Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


async def structured(site: Site, known: Known, r: random.Random) -> str:
    """Mixed with the others: rows whose tokens a grammar restricts."""
    count = r.randint(1, 12)
    text = ""
    pattern = f"[abc]{{{count}}}"
    sampling = {"max_tokens": 16, "seed": count, "structured_outputs": {"regex": pattern}}
    async with aclosing(site.client.generate(token_ids=known.token_ids, **sampling)) as chunks:
        async for chunk in chunks:
            text += chunk.text
    if re.fullmatch(pattern, text) is None:
        raise WrongAnswerError(f"{text!r} does not match {pattern}")
    return "whole"


async def embed(site: Site, known: Known, r: random.Random) -> str:
    one, two = [await site.client.embed(token_ids=known.token_ids, pooling="mean") for _ in range(2)]
    if max(abs(a - b) for a, b in zip(one.values, two.values, strict=True)) > 1e-3:
        raise WrongAnswerError(f"one prompt's embeddings: {one.values} and {two.values}")
    return "whole"


async def stall(site: Site, known: Known, r: random.Random) -> str:
    """Reads nothing after its first token for longer than the server lets it."""
    num_tokens = min(512, site.model.max_model_len - len(known.token_ids))
    sampling = {"max_tokens": num_tokens, "ignore_eos": True, "n": 4}
    sampling["logprobs"] = ALL_LOGPROBS if site.model.vocab_size < 1000 else 20  # more than the window takes
    request = generate_request(None, known.token_ids, None, sampling, None, None, None)
    async with grpc.aio.insecure_channel(site.target, options=SMALL_WINDOW) as channel:
        call = channel.unary_stream(METHOD, pb.GenerateRequest.SerializeToString)(request)
        try:
            await call.read()
            await asyncio.sleep(2 * site.info.slow_reader_timeout_s)
            while await call.read() is not grpc.aio.EOF:  # pyright: ignore[reportAttributeAccessIssue]: not in its stubs
                pass
        except grpc.aio.AioRpcError as error:
            return expect(error.code(), Code.ABORTED)
    raise WrongAnswerError(f"all came to a client that read nothing for {site.info.slow_reader_timeout_s:g} s")


async def cut(site: Site, known: Known, r: random.Random) -> str:
    """The connection ends by RST while tokens come."""
    return await _through_tap(site, known, Tap.reset)


async def half_close(site: Site, known: Known, r: random.Random) -> str:
    """The server reads the end of the connection while it streams."""
    return await _through_tap(site, known, Tap.half_close)


async def garbage(site: Site, known: Known, r: random.Random) -> str:
    """A frame that is none comes in the middle of a connection that streams."""
    return await _through_tap(site, known, lambda tap: tap.inject(NO_FRAME))


async def _through_tap(site: Site, known: Known, break_it: Any) -> str:
    async with (
        Tap(site.grpc_port) as tap,
        AsyncClient(f"127.0.0.1:{tap.port}") as client,
        aclosing(generate(client, known)) as chunks,
    ):

        async def breaking() -> AsyncGenerator[Part]:
            is_first = True
            async for chunk in chunks:
                yield chunk
                if is_first:
                    is_first = False
                    break_it(tap)

        try:
            return await read(breaking(), known)
        except grpc.aio.AioRpcError as error:
            return expect(error.code(), Code.UNAVAILABLE, Code.INTERNAL, Code.CANCELLED)


async def no_http2(site: Site, known: Known, r: random.Random) -> str:
    """Bytes that are no HTTP/2, or a frame that is none after a good beginning."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.grpc_port)
    try:
        writer.write(r.choice([r.randbytes(200), PREFACE + NO_FRAME, b"GET / HTTP/1.1\r\n\r\n"]))
        while await reader.read(2**16):  # the server closes it
            pass
    except ConnectionError:
        return "reset"
    finally:
        writer.close()
    return "closed"


async def malformed(site: Site, known: Known, r: random.Random) -> str:
    """Bytes that are no message."""
    return await _status(site, r.choice([b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 20]), Code.INVALID_ARGUMENT)


async def nested(site: Site, known: Known, r: random.Random) -> str:
    """Groups in groups."""
    return await _status(site, b"\x0b" * min(100_000, site.info.max_message_bytes), Code.INVALID_ARGUMENT)


async def too_large(site: Site, known: Known, r: random.Random) -> str:
    return await _status(site, b"\x0a" + bytes(site.info.max_message_bytes), Code.RESOURCE_EXHAUSTED)


async def _status(site: Site, data: bytes, wanted: grpc.StatusCode) -> str:
    try:
        async for _ in site.channel.unary_stream(METHOD)(data):
            pass
    except grpc.aio.AioRpcError as error:
        return expect(error.code(), wanted)
    raise WrongAnswerError(f"OK, not {wanted.name}")


KINDS: dict[str, Kind] = {
    f"grpc {kind.__name__}": kind
    for kind in (
        *(whole, slow, batch, choices, structured, embed, impatient),
        *(leave, cancel, abort, deadline, stall),
        *(cut, half_close, garbage, no_http2, malformed, nested, too_large),
    )
}
