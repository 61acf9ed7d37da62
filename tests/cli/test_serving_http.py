"""``jaxserve serve --http-port`` as a process, and the official OpenAI client of it."""

import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from jaxserve.cli.serving import served_name
from jaxserve.server.client import Client
from tests.cli.test_serving import START_S

pytestmark = pytest.mark.timeout(2 * START_S)


@pytest.fixture
def ports(spawn, tiny: list[str]) -> Iterator[tuple[int, int]]:
    """gRPC and HTTP ports of a server that is ready; SIGTERM must end it well."""
    process = spawn("serve", *tiny, "--grpc-port=0", "--http-port=0")  # tiny.gguf, in some folder
    lines: list[str] = []
    found = None
    for line in process.stderr:
        lines.append(line)
        found = re.match(r"listening on \S+:(\d+), http on \S+:(\d+)", line) or found
        if line.startswith("ready on "):
            break
    assert found, lines
    rest = threading.Thread(target=lambda: lines.extend(process.stderr))
    rest.start()
    yield int(found[1]), int(found[2])
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, lines
    rest.join()
    assert not any("Traceback" in line for line in lines), lines


def test_openai_client_of_a_real_model(ports: tuple[int, int]):
    grpc_port, http_port = ports
    with Client(f"127.0.0.1:{grpc_port}") as client:
        greedy = list(client.generate("hello", temperature=0, max_tokens=12, ignore_eos=True))
    expected = "".join(chunk.text for chunk in greedy)
    token_ids = [i for chunk in greedy for i in chunk.token_ids]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{http_port}/v1", api_key="none", max_retries=0) as ai:
        assert [model.id for model in ai.models.list()] == ["tiny"]
        body = {"ignore_eos": True}
        answer = ai.completions.create(
            model="tiny", prompt="hello", temperature=0, max_tokens=12, logprobs=2, extra_body=body
        )
        assert answer.choices[0].text == expected
        logprobs = answer.choices[0].logprobs
        assert logprobs and logprobs.token_logprobs and logprobs.top_logprobs
        assert len(logprobs.token_logprobs) == 12
        for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
            assert value == max(top.values())  # greedy
        chunks = ai.completions.create(
            model="tiny", prompt="hello", temperature=0, max_tokens=12, stream=True, extra_body=body
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        messages = [{"role": "user", "content": "hello"}]
        chat: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 12, "seed": 5, "extra_body": body}
        whole = ai.chat.completions.create(**chat).choices[0].message.content
        pieces = [c.choices[0].delta.content or "" for c in ai.chat.completions.create(**chat, stream=True)]
        assert "".join(pieces) == whole
        several = ai.completions.create(model="tiny", prompt=["hello", "b"], temperature=0, max_tokens=3, n=2)
        assert len(several.choices) == 4
        for bad, param in (
            ({"logprobs": 10**6}, "logprobs"),
            ({"prompt": [10**6]}, "prompt"),
            ({"max_tokens": 10**6}, "max_tokens"),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ai.completions.create(**dict[str, Any]({"model": "tiny", "prompt": "hello", **bad}))
            assert caught.value.param == param
    with Client(f"127.0.0.1:{grpc_port}") as client:
        load = client.server_info().load
        assert load.num_running == load.num_pages_held == load.recompilations_after_ready == 0
    assert len(token_ids) == 12


def test_names_of_models(tmp_path: Path):
    (tmp_path / "some-model").mkdir()
    assert served_name(str(tmp_path / "some-model")) == served_name(f"{tmp_path}/some-model/") == "some-model"
    assert served_name("org/model@main") == "org/model@main"
