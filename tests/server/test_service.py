import asyncio
import dataclasses
import gc
import threading
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from jaxserve.request import TokenLogprobs
from jaxserve.server.client import Client, batch_request
from jaxserve.server.interceptors import LostCallInterceptor
from jaxserve.server.v1 import inference_pb2 as pb
from jaxserve.text.tokenizer import Tokenizer
from tests.server.conftest import TIMEOUT_S, endless_engine, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_text, expected_tokens

Code = grpc.StatusCode


async def text_of(stream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def refused(stream) -> grpc.aio.AioRpcError:
    """The error that a stream or a unary call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(stream, "__aiter__"):
            async for _ in stream:
                pass
        else:
            await stream
    return caught.value


def field_of(error: grpc.aio.AioRpcError) -> object:
    return dict(error.trailing_metadata() or ()).get("jaxserve-field")


async def test_text_token_ids_and_messages_give_the_known_stream():
    async with serving() as s:
        chat = [{"role": "user", "content": "hi"}]
        assert await text_of(s.client.generate("héllo", max_tokens=30)) == expected_text("héllo", 30)
        assert await text_of(s.client.generate(token_ids=[1, 2], max_tokens=30)) == expected_text([1, 2], 30)
        assert await text_of(s.client.generate(messages=chat, max_tokens=30)) == expected_text("user:hi;", 30)


async def test_chunks_carry_ids_index_logprobs_reason_and_usage():
    async with serving() as s:
        chunks = [c async for c in s.client.generate("ab", max_tokens=5, logprobs=2, request_id="me")]
        tokens = expected_tokens("ab", 5)
        assert [t for c in chunks for t in c.token_ids] == tokens
        assert [c.index for c in chunks] == [sum(len(d.token_ids) for d in chunks[:i]) for i in range(len(chunks))]
        assert {c.request_id for c in chunks} == {"me"}
        logprobs = [entry for c in chunks for entry in c.logprobs]
        assert logprobs == [TokenLogprobs(token_id=t, logprob=-0.5, top=((t, -0.5), (t + 1, -1.5))) for t in tokens]
        last = chunks[-1]
        assert all(c.finish_reason is None and c.usage is None for c in chunks[:-1])
        assert (last.finish_reason, last.stop_reason) == ("length", None)
        assert last.usage is not None and dataclasses.astuple(last.usage) == (2, 5, 1, None)


async def test_no_logprobs_unless_asked_and_stop_id_is_told():
    async with serving() as s:
        stop_id = expected_tokens("ab", 4)[-1]
        chunks = [c async for c in s.client.generate("ab", stop_token_ids=[stop_id])]
        assert not any(c.logprobs for c in chunks)
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop_id)


async def test_priority_and_deadline_reach_the_engine():
    async with serving() as s:
        before = time.monotonic()
        await text_of(s.client.generate("a", max_tokens=1, priority=-3, timeout_s=100))
        await text_of(s.client.generate("a", max_tokens=1))
        with_deadline, without = s.engine.requests
        assert (with_deadline.priority, without.priority) == (-3, 0)
        rounding_s = 2.0  # the transport rounds a timeout up by about a hundredth; the client itself does not
        assert with_deadline.deadline is not None
        assert before + 100 - rounding_s < with_deadline.deadline < time.monotonic() + 100 + rounding_s
        assert without.deadline is None


@pytest.mark.parametrize("how", ["close", "drop", "cancel", "channel"])
async def test_a_dropped_stream_frees_the_request(how):
    async with serving(endless_engine()) as s:
        stream = s.client.generate("a")
        await anext(stream)
        assert not s.engine.idle.is_set()
        if how == "close":
            await stream.aclose()
        elif how == "drop":
            del stream
            gc.collect()
        elif how == "channel":
            await s.client.close()
        else:
            reading = asyncio.ensure_future(text_of(stream))
            await asyncio.sleep(0)  # lets it start
            reading.cancel()
        assert await s.is_idle()


async def test_the_clients_deadline_ends_and_frees_the_request():
    async with serving(endless_engine()) as s:
        error = await refused(s.client.generate("a", timeout_s=0.1))
        assert error.code() == Code.DEADLINE_EXCEEDED
        assert await s.is_idle()


async def test_abort():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("a", request_id="x")
        await anext(stream)
        await s.client.abort("x")
        assert [c async for c in stream][-1].finish_reason == "abort"
        assert s.engine.idle.is_set()
        for request_id in ("x", "never", ""):
            error = await refused(s.client.abort(request_id))
            assert (error.code(), field_of(error)) == (Code.NOT_FOUND, "request_id")


async def test_duplicate_request_id():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("a", request_id="x")
        await anext(stream)
        error = await refused(s.client.generate("b", request_id="x"))
        assert (error.code(), field_of(error)) == (Code.ALREADY_EXISTS, "request_id")
        await anext(stream)
        await stream.aclose()


async def test_a_full_queue_is_resource_exhausted():
    async with serving(endless_engine(max_num_waiting=1)) as s:
        stream = s.client.generate("a")
        await anext(stream)
        assert (await refused(s.client.generate("b"))).code() == Code.RESOURCE_EXHAUSTED
        await stream.aclose()
        assert await s.is_idle()
        assert await text_of(s.client.generate("b", max_tokens=2)) == expected_text("b", 2)


async def test_a_slow_reader_is_aborted():
    # 64 KiB of text a token fill the transport's window at once; the client then reads nothing.
    engine = endless_engine(text_scale=65536, step_delay_s=0.005)
    async with serving(engine, slow_reader_timeout_s=0.2) as s:
        stream = s.client.generate("a")
        first = await anext(stream)
        assert await s.is_idle()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            texts = [first.text]
            async for chunk in stream:
                texts.append(chunk.text)
        assert caught.value.code() == Code.ABORTED
        assert "0.2 s" in (caught.value.details() or "")
        letters = "".join(texts)[::65536]
        assert letters == expected_text("a", len(letters)), "what was sent before is whole"


@pytest.mark.parametrize("text_scale", [65536, 10_000_000], ids=["a-later-write-blocks", "the-first-write-blocks"])
async def test_a_client_that_never_reads_holds_no_handler_and_no_drain(text_scale):
    engine = endless_engine(text_scale=text_scale, step_delay_s=0.005)
    async with serving(engine, slow_reader_timeout_s=0.2, drain_timeout_s=TIMEOUT_S) as s:
        calls = [s.client._stub.Generate(pb.GenerateRequest(text="a")) for _ in range(3)]
        while len(engine.requests) < 3:
            await asyncio.sleep(0.01)
        assert await s.is_idle()
        start = time.monotonic()
        assert await s.server.drain() is True
        assert time.monotonic() - start < TIMEOUT_S / 2
        for call in calls:  # who reads in the end learns what happened
            assert (await refused(call)).code() == Code.ABORTED


async def test_a_failing_engine_fails_the_streams():
    async with serving(endless_engine()) as s:
        stream = s.client.generate("a")
        await anext(stream)
        s.engine.fail.set()
        error = await refused(stream)
        assert error.code() == Code.UNAVAILABLE and "the device was lost" in (error.details() or "")
        assert (await refused(s.client.generate("a"))).code() == Code.UNAVAILABLE
        assert (await s.client.server_info()).state == pb.SERVER_STATE_FAILED


async def test_prompts_that_are_refused():
    async with serving() as s:
        cases = [
            ({"prompt": ""}, "prompt"),
            ({"token_ids": []}, "prompt"),
            ({"prompt": "x" * 400}, "prompt"),
            ({"prompt": "x" * 10_000}, "prompt"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
            ({"messages": [{"role": "user", "content": "x" * 10_000}]}, "messages"),
        ]
        for prompt, field in cases:
            error = await refused(s.client.generate(**prompt))
            assert (error.code(), field_of(error)) == (Code.INVALID_ARGUMENT, field), (str(prompt)[:60], error)
        error = await refused(s.client._stub.Generate(pb.GenerateRequest()))
        assert (error.code(), field_of(error)) == (Code.INVALID_ARGUMENT, "prompt")


async def test_what_the_model_lacks_is_a_failed_precondition():
    chat = [{"role": "user", "content": "x"}]
    async with serving(FakeEngine(tokenizer=byte_tokenizer(chat_template=None))) as s:
        assert (await refused(s.client.generate(messages=chat))).code() == Code.FAILED_PRECONDITION
        assert (await refused(s.client.tokenize(messages=chat))).code() == Code.FAILED_PRECONDITION
        assert not (await s.client.model_info()).has_chat_template
    async with serving(FakeEngine(tokenizer=None)) as s:
        assert (await refused(s.client.generate("x"))).code() == Code.FAILED_PRECONDITION
        assert (await refused(s.client.tokenize("x"))).code() == Code.FAILED_PRECONDITION
        assert (await refused(s.client.detokenize([1]))).code() == Code.FAILED_PRECONDITION
        assert await text_of(s.client.generate(token_ids=[1], max_tokens=3)) == expected_text([1], 3)
        assert not (await s.client.model_info()).has_tokenizer


@pytest.mark.parametrize(
    ("options", "code"),
    [({}, Code.INVALID_ARGUMENT), ({"max_prompt_bytes": 100}, Code.INVALID_ARGUMENT),
     ({"max_message_bytes": 2**20}, Code.RESOURCE_EXHAUSTED)],
)  # fmt: skip
async def test_a_10_mb_prompt_is_refused_untokenized_while_others_stream(options, code, monkeypatch):
    encoded, encode = [], Tokenizer.encode

    def spying(self, text, **kwargs):
        encoded.append(len(text))
        return encode(self, text, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", spying)
    async with serving(endless_engine(), **options) as s:
        other = s.client.generate("a")
        await anext(other)
        for call in (s.client.generate("x" * 10_000_000), s.client.tokenize("x" * 10_000_000)):
            assert (await refused(call)).code() == code
        assert encoded == [1]
        await anext(other)
        await other.aclose()


async def test_max_prompt_bytes_counts_bytes_not_characters():
    async with serving(max_prompt_bytes=6) as s:
        assert await text_of(s.client.generate("ééé", max_tokens=1)) == expected_text("ééé", 1)
        error = await refused(s.client.generate("éééé"))
        assert "8 bytes" in (error.details() or "") and "at most 6" in (error.details() or "")
        assert (await refused(s.client.tokenize("éééé"))).code() == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "Abort"])
async def test_invalid_bytes_are_answered_with_an_error_and_the_server_lives(method):
    async with serving() as s:
        field_1_string_of_ff = b"\x0a\x02\xff\xfe"
        for raw in (field_1_string_of_ff, b"\x0a\x7fshort", b"\xff"):
            async with grpc.aio.insecure_channel(s.target) as channel:
                path = f"/jaxserve.v1.Inference/{method}"
                error = await refused(
                    (channel.unary_stream if method == "Generate" else channel.unary_unary)(path)(raw)
                )
                assert error.code() != Code.OK
        assert await text_of(s.client.generate("a", max_tokens=3)) == expected_text("a", 3)


async def test_tokenize_and_detokenize():
    async with serving() as s:
        assert await s.client.tokenize("é") == [0xC3, 0xA9]
        assert await s.client.tokenize("é", add_special_tokens=False) == [0xC3, 0xA9]
        assert await s.client.tokenize(messages=[{"role": "u", "content": "c"}]) == list(b"u:c;")
        assert await s.client.detokenize([0xC3, 0xA9, 256]) == "é"
        assert await s.client.detokenize([0x61, 256], skip_special_tokens=False) == "a<eos>"
        assert await s.client.tokenize("") == [] and await s.client.detokenize([]) == ""
        for bad in (-1, 257):
            error = await refused(s.client.detokenize([1, bad]))
            assert (error.code(), field_of(error)) == (Code.INVALID_ARGUMENT, "token_ids")


async def test_model_info_and_server_info():
    async with serving(max_message_bytes=123_456, slow_reader_timeout_s=7) as s:
        model = await s.client.model_info()
        assert (model.model_name, model.dtype, model.max_model_len, model.vocab_size) == ("fake", "float32", 400, 257)
        assert list(model.eos_token_ids) == [256]
        await text_of(s.client.generate("abc", max_tokens=5))
        info = await s.client.server_info()
        assert info.state == pb.SERVER_STATE_READY and info.version
        assert (info.max_message_bytes, info.slow_reader_timeout_s, info.page_size) == (123_456, 7, 16)
        assert not info.HasField("max_prompt_bytes")
        assert (info.load.prompt_tokens, info.load.generation_tokens, info.load.num_running) == (3, 5, 0)


async def test_the_blocking_client():
    async with serving(endless_engine()) as s:

        def use():
            with Client(s.target) as client:
                client.wait_ready(TIMEOUT_S)
                assert "".join(c.text for c in client.generate("ab", max_tokens=9)) == expected_text("ab", 9)
                stream = client.generate("a")
                next(stream)
                stream.close()
                assert s.engine.idle.wait(TIMEOUT_S)
                with pytest.raises(grpc.RpcError) as caught:
                    client.abort("nobody")
                assert caught.value.code() == Code.NOT_FOUND  # pyright: ignore[reportAttributeAccessIssue]
                assert client.detokenize(client.tokenize("né")) == "né"
                assert client.model_info().model_name == "fake" and client.server_info().max_num_seqs == 8

        await asyncio.to_thread(use)


async def test_while_loading():
    may_build = threading.Event()
    async with serving(may_build=may_build, wait_ready=False) as s:
        for call in (s.client.generate("a"), s.client.tokenize("a"), s.client.abort("a"), s.client.model_info()):
            assert (await refused(call)).code() == Code.UNAVAILABLE
        info = await s.client.server_info()
        assert info.state == pb.SERVER_STATE_LOADING and not info.HasField("load")


async def test_only_what_is_small_and_plain_is_read_on_the_event_loop(monkeypatch: pytest.MonkeyPatch):
    async with serving() as s:
        threads: list[bool] = []
        make_request = s.engine.make_request

        def noting(*args, **fields):
            threads.append(threading.current_thread() is not threading.main_thread())
            return make_request(*args, **fields)

        monkeypatch.setattr(s.engine, "make_request", noting)
        hello = [{"role": "user", "content": "hi"}]
        asked: list[dict[str, Any]] = [
            {"prompt": "a"},
            {"token_ids": [97]},
            {"prompt": "a" * 390, "bad_words": ["b" * 200]},
            {"prompt": "a", "structured_outputs": {"regex": "a+"}},
            {"messages": hello},
        ]
        for fields in asked:
            [_ async for _ in s.client.generate(**fields, max_tokens=2)]
            [_ async for _ in s.client.generate_batch([batch_request("b", **fields, max_tokens=2)])]
    assert threads == [False] * 4 + [True] * 6


class LostContext:
    """Of a call whose client has gone, which gRPC has not told yet: sends fail, from the ``num_sent``-th on."""

    def __init__(self, num_sent: int):
        self._num_left = num_sent

    async def send_initial_metadata(self, metadata: object) -> None:
        if self._num_left == 0:
            raise grpc.aio.InternalError('Failed "execute_batch": ...')
        self._num_left -= 1

    write = send_initial_metadata

    async def abort(self, code: object, details: str, metadata: object) -> None:
        await self.send_initial_metadata(metadata)

    def add_done_callback(self, callback: object) -> None:
        pass

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@pytest.mark.parametrize(
    ("method", "num_sent"),
    [*((method, sent) for method in ("Generate", "GenerateBatch") for sent in (0, 1, 3)), ("refused", 0), ("Abort", 0)],
)
async def test_a_send_that_fails_ends_the_call_and_is_no_error_of_the_server(method: str, num_sent: int):
    """gRPC takes CancelledError for a client that went; its own error it raises into nowhere, as a task's."""

    async def messages():
        for i in range(3):
            yield batch_request(f"{i}", "abc")
        await asyncio.sleep(TIMEOUT_S)  # half of the call is open still

    async with serving(endless_engine()) as s:
        service = s.server._service
        form, method_of, asked = {
            "Generate": ("unary_stream", service.Generate, batch_request("a", "abc")),
            "refused": ("unary_stream", service.Generate, batch_request("a", "abc", temperature=-1.0)),
            "GenerateBatch": ("stream_stream", service.GenerateBatch, messages()),
            "Abort": ("unary_unary", service.Abort, pb.AbortRequest(request_id="nobody")),
        }[method]

        async def continuation(details: object) -> grpc.RpcMethodHandler:
            return getattr(grpc, f"{form}_rpc_method_handler")(method_of)

        details: Any = None  # which it does not read
        handler = await LostCallInterceptor().intercept_service(continuation, details)
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(TIMEOUT_S / 2):
                await getattr(handler, form)(asked, LostContext(num_sent))
        assert await s.is_idle()
