import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from jaxserve.loadtest.arrivals import poisson, read_trace


def written(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return path


def test_poisson_arrivals_have_the_rate_and_the_variation():
    arrivals = poisson(4000, 5.0, seed=1, max_prompt=64, max_output=32)
    gaps = [b.at_s - a.at_s for a, b in pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(1, rel=0.05)
    assert arrivals == poisson(4000, 5.0, seed=1, max_prompt=64, max_output=32)
    assert {a.at_s for a in poisson(3, float("inf"), seed=0, max_prompt=8, max_output=8)} == {0.0}
    with pytest.raises(ValueError, match="request_rate=0 is not more than 0"):
        poisson(1, 0.0, seed=0, max_prompt=8, max_output=8)


def test_prompts_are_of_their_length_and_differ():
    one, two = poisson(2, 1.0, seed=3, max_prompt=64, max_output=8)
    assert len(one.prompt(100)) == one.prompt_len and one.prompt(100) == one.prompt(100)
    assert one.prompt(100)[:4] != two.prompt(100)[:4]
    assert all(0 <= token < 5 for token in one.prompt(5))


def test_turns_of_a_chat_begin_with_what_was_said(tmp_path):
    first = {"session": 7, "turn": 0, "prompt_len": 5, "output_len": 3, "arrival_s": 0.5}
    other = {"session": 8, "turn": 0, "prompt_len": 5, "output_len": 3, "arrival_s": 1}
    second = {"session": 7, "turn": 1, "prompt_len": 12, "output_len": 1, "arrival_s": 2}
    arrivals = read_trace(written(tmp_path, first, other, second))
    assert [a.follows for a in arrivals] == [None, None, 0]
    said = [*arrivals[0].prompt(99), 1, 2, 3]
    prompt = arrivals[2].prompt(99, said)
    assert len(prompt) == 12 and prompt[:8] == said and arrivals[1].prompt(99) != said[:5]


def test_equal_blocks_of_a_mooncake_trace_are_equal_tokens(tmp_path):
    rows = [
        {"timestamp": 27, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]},
    ]
    one, two = read_trace(written(tmp_path, *rows))
    assert (one.at_s, two.at_s, two.num_output_tokens) == (0.027, 1.5, 6)
    a, b = one.prompt(1000), two.prompt(1000)
    assert (len(a), len(b)) == (1000, 700) and a[:512] == b[:512] and a[512:520] != b[512:520]


GOOD = {"prompt_len": 5, "output_len": 3, "arrival_s": 1.0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is not JSON"),
        (["[]"], "line 1 is not a JSON object"),
        ([GOOD, GOOD | {"prompt_len": 0}], "line 2: prompt_len=0 is not a number of at least 1"),
        ([GOOD | {"output_len": "3"}], "output_len='3' is not"),
        ([GOOD | {"arrival_s": -1}], "arrival_s=-1 is not"),
        ([{"prompt_len": 5, "output_len": 3}], "arrival_s=None"),
        ([GOOD, GOOD | {"arrival_s": 0.5}], "line 2: arrives at 0.5 s, the line before at 1 s"),
        ([{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}], "1 hash_ids are too few"),
        ([{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}], r"hash_ids=\['a'\]"),
        ([], "has 0 requests"),
    ],
)
def test_what_is_no_trace_is_told_by_line_and_field(tmp_path, rows, message):
    with pytest.raises(ValueError, match=r"trace\.jsonl: .*" + message):
        read_trace(written(tmp_path, *rows))
