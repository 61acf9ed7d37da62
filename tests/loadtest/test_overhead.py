"""The readers that messages are counted with, against the fake engine's server."""

import asyncio
import os

import pytest

from jaxserve.loadtest.overhead import GrpcReader, HttpReader
from jaxserve.loadtest.process import Served
from tests.server.conftest import endless_engine, serving


@pytest.mark.parametrize("kind", [GrpcReader, HttpReader])
async def test_readers_count_messages_tokens_and_bytes(kind):
    async with serving(endless_engine(step_delay_s=0.005), http_port=0) as s:
        reader = kind(Served(s.target, s.url, os.getpid(), {}))

        def read(stream_interval: int):
            return list(reader.read([1, 2, 3], 41, stream_interval))

        try:
            each, few = [await asyncio.to_thread(read, interval) for interval in (1, 5)]
            for pieces in (each, few):
                assert sum(p.num_tokens for p in pieces) == 41
                assert [p.at_s for p in pieces] == sorted(p.at_s for p in pieces)
                assert all(p.num_bytes > 0 for p in pieces)
            assert len(few) <= 10 < len(each)
            assert sum(p.num_bytes for p in few) < sum(p.num_bytes for p in each)
        finally:
            reader.close()
