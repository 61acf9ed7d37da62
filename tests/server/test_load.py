"""Sixty-four clients at once against the real engine with a pool far too small for them."""

import asyncio
import random
from contextlib import aclosing

import grpc
import pytest

from jaxserve.request import SamplingParams
from jaxserve.server.app import Server
from jaxserve.server.client import AsyncClient
from jaxserve.server.options import ServerOptions
from tests import tiny

pytestmark = pytest.mark.timeout(600)  # a busy machine compiles and runs slowly

NUM_STREAMS = 64
SIZES = {"num_pages": 40, "max_num_seqs": 8, "max_model_len": 96, "page_size": 4}


@pytest.mark.parametrize("seed", [0, 1])
async def test_survivors_get_exactly_the_tokens_of_a_solo_run(seed):
    r = random.Random(seed)
    prompts = tiny.prompts(NUM_STREAMS, seed=seed)
    fields = [
        {"max_tokens": r.randint(1, 50), "temperature": r.choice([0.0, 1.0]), "seed": i, "ignore_eos": r.random() < 0.5}
        for i in range(NUM_STREAMS)
    ]
    fates = r.choices(["finish", "leave", "cancel", "abort", "deadline"], [12, 2, 2, 2, 1], k=NUM_STREAMS)
    with tiny.engine(**SIZES) as engine:
        solo = [engine.generate([p], SamplingParams(**f))[0] for p, f in zip(prompts, fields, strict=True)]

    server = Server(lambda: tiny.engine(**SIZES), ServerOptions(port=0))
    await server.start()
    await server.ready()
    engine = server.engine.engine
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:

        async def one(i: int) -> tuple[list[int], str]:
            tokens, text = [], ""
            leave_after = r.randint(1, fields[i]["max_tokens"])
            timeout_s = 0.05 if fates[i] == "deadline" else None
            await asyncio.sleep(r.random() * 0.3)
            stream = client.generate(token_ids=prompts[i], request_id=f"r{i}", timeout_s=timeout_s, **fields[i])
            async with aclosing(stream):
                async for chunk in stream:
                    tokens += chunk.token_ids
                    text += chunk.text
                    if len(tokens) >= leave_after and not chunk.finish_reason:
                        if fates[i] == "leave":
                            break
                        if fates[i] == "cancel":
                            raise asyncio.CancelledError
                        if fates[i] == "abort":
                            try:
                                await client.abort(f"r{i}")
                            except grpc.RpcError as error:  # it may just have ended
                                assert error.code() == grpc.StatusCode.NOT_FOUND
            return tokens, text

        results = await asyncio.wait_for(
            asyncio.gather(*(one(i) for i in range(NUM_STREAMS)), return_exceptions=True), 300
        )
        for i, result in enumerate(results):
            if fates[i] == "finish":
                assert result == (solo[i].token_ids, solo[i].text), i
            elif isinstance(result, tuple):  # what a reader that left had got was right
                assert result[0] == solo[i].token_ids[: len(result[0])], i
            elif fates[i] == "deadline":
                assert isinstance(result, grpc.RpcError) and result.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                assert isinstance(result, asyncio.CancelledError) and fates[i] == "cancel", (i, result)
        while engine.has_unfinished():  # cancellations reach the engine's thread a moment after the client has left
            await asyncio.sleep(0.01)
        stats = engine.stats()
        assert stats.num_pages_held == 0 and stats.num_running == 0 and stats.num_waiting == 0
        assert stats.num_preemptions > 0
        assert stats.recompilations_after_ready == 0
        again = [c async for c in client.generate(token_ids=prompts[0], **fields[0])]
        assert [t for c in again for t in c.token_ids] == solo[0].token_ids
    assert await server.close()
