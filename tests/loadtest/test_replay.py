"""Replay against the fake engine's server, and what is made of its answers."""

import json
import time

import pytest

from jaxserve.cli.app import run as command
from jaxserve.loadtest.arrivals import Arrival
from jaxserve.loadtest.figures import figures
from jaxserve.loadtest.replay import Answer, replay
from jaxserve.request import TokenEvent
from tests.server.conftest import endless_engine, serving
from tests.server.fake_engine import FakeEngine, byte_tokenizer, expected_tokens


def arrival(at_s: float, prompt_len: int, num_output_tokens: int, follows: int | None = None) -> Arrival:
    return Arrival(
        at_s=at_s,
        prompt_len=prompt_len,
        num_output_tokens=num_output_tokens,
        blocks=(int(at_s * 1000),),
        block_len=prompt_len,
        follows=follows,
    )


class Patient(FakeEngine):
    """Its first request does not end before there is a second one."""

    def step(self) -> list[TokenEvent]:
        if len(self.requests) == 1 and self.num_steps > 100:
            time.sleep(0.001)
            return []
        return super().step()


async def test_requests_are_sent_when_due_and_answered_whole():
    async with serving(Patient(tokenizer=byte_tokenizer(), max_model_len=1000, step_delay_s=0.001)) as s:
        arrivals = [arrival(0.0, 5, 300), arrival(0.05, 4, 10), arrival(0.1, 400, 2, follows=0)]
        answers = await replay(s.client, arrivals, 256)
        assert [len(a.tokens) for a in answers] == [300, 10, 2] and not any(a.error for a in answers)
        first, second, third = sorted(s.engine.requests, key=lambda r: [5, 4, 400].index(len(r.prompt_token_ids)))
        for request, answer in zip((first, second, third), answers, strict=True):
            assert answer.tokens == expected_tokens(request.prompt_token_ids, len(answer.tokens))
        assert answers[1].sent >= answers[1].due > answers[0].due
        assert answers[1].messages[-1][0] < answers[0].messages[-1][0], "the second did not wait for the first"
        said = third.prompt_token_ids
        assert said[:305] == (*first.prompt_token_ids, *answers[0].tokens)
        assert answers[2].due >= answers[0].messages[-1][0]


async def test_a_request_that_fails_is_counted_and_the_others_go_on():
    async with serving(endless_engine(max_model_len=2000, step_delay_s=0.01)) as s:
        answers = await replay(s.client, [arrival(0.0, 5, 1900), arrival(0.1, 2500, 5)], 256, timeout_s=2)
        assert [a.error for a in answers] == ["DEADLINE_EXCEEDED", "INVALID_ARGUMENT"]
        row = figures(answers)
        assert row["num_failed"] == 2 and row["errors"] == {"DEADLINE_EXCEEDED": 1, "INVALID_ARGUMENT": 1}
        assert row["goodput_requests_per_s"] == 0 and row["ttft_p50_ms"] is None


def test_figures_by_hand():
    good = Answer(10.0, 10.001, 7, [(10.5, 1), (10.52, 1), (10.56, 2)], [1, 2, 3, 4])
    late = Answer(10.0, 10.0, 3, [(11.5, 1), (11.6, 1)], [1, 2])
    slow = Answer(11.0, 11.0, 3, [(11.1, 1), (12.0, 1)], [1, 2])
    failed = Answer(11.0, 11.0, 5, [(11.1, 1)], [1], "UNAVAILABLE")
    row = figures([good, late, slow, failed])
    assert row["duration_s"] == 2.0 and row["num_failed"] == 1 and row["output_tokens"] == 9
    assert row["goodput_requests_per_s"] == 0.5 and row["goodput_share"] == 0.25
    assert row["requests_per_s"] == 1.5 and row["prompt_tokens"] == 18
    assert row["ttft_p50_ms"] == pytest.approx(500) and row["itl_p50_ms"] == pytest.approx(70)
    assert row["tpot_p50_ms"] == pytest.approx(100) and row["client_late_p99_ms"] == pytest.approx(0.97)


@pytest.mark.timeout(300)  # a server of its own on a busy machine
def test_from_the_command_line_a_chat_is_read_from_the_prefix_cache(tmp_path, capsys):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    turns = [
        {"session": 0, "turn": i, "prompt_len": 40 + 40 * i, "output_len": 4, "arrival_s": i * 0.1} for i in range(3)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, turns)))
    asked = f"--trace={tmp_path}/trace.jsonl --load-format=dummy --platform=cpu"
    engine = "--max-num-seqs=1 --decode-sizes=1 --prefill-sizes=64 --max-model-len=200"
    assert command(["bench", "serve", str(tmp_path), *asked.split(), *engine.split(), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prefix_hit_rate"] == pytest.approx((32 + 80) / 240, abs=1e-4)  # whole pages of 16
    assert row["num_failed"] == 0 and row["output_tokens"] == 12 and row["recompilations"] == 0
    assert row["ttft_p99_ms"] > 0 and row["load"] == "trace.jsonl"
