"""From a checkpoint to rows with all their keys, to JSON lines and tables."""

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jaxserve.bench.batching import BatchingRow, run
from jaxserve.bench.environment import device_in_words, source_commit
from jaxserve.bench.report import print_batching
from tests.checkpoint.tiny_gguf import write

OPTIONS: dict[str, Any] = {"num_requests": 6, "seed": 1, "max_prompt": 12, "max_output": 8, "max_num_seqs": 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.gguf"
    write(path)
    return run(str(path), **OPTIONS, page_size=4, prefill_sizes=(9,))


def test_every_row_has_every_key_and_is_a_line_of_json(rows: list[dict[str, Any]]):
    keys = {field.name for field in fields(BatchingRow)}
    keys |= {"seed", "max_prompt", "max_output", "model", "device", "driver", "versions", "commit", "command"}
    for row in rows:
        line = json.dumps(row)
        assert "\n" not in line and json.loads(line) == row and set(row) == keys


def test_rows_say_how_to_repeat_them(rows: list[dict[str, Any]]):
    assert {row["command"] for row in rows} == {
        "jaxserve bench batching tiny.gguf --num-requests=6 --seed=1 --max-prompt=12 --max-output=8 --max-num-seqs=2"
        " --page-size=4 --prefill-sizes=9"
    }
    assert {row["max_model_len"] for row in rows} == {12 + 8}
    assert all("/" not in text for text in (rows[0]["model"], rows[0]["device"]))


def test_shares_of_the_memory_add_up(rows: list[dict[str, Any]]):
    names = ("kv_utilisation_mean", "kv_reserved_mean", "kv_internal_fragmentation_mean", "kv_unallocated_mean")
    for row in rows:
        assert sum(row[name] for name in names) == pytest.approx(1)


def test_tables_have_both_comparisons(rows: list[dict[str, Any]]):
    console = Console(file=io.StringIO(), width=100)
    print_batching(rows, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "continuous against static batching" in text and "paged against static allocation" in text
    assert "all four runs returned identical greedy tokens" in text
    assert f"{rows[2]['kv_utilisation_mean']:.1%}" in text and rows[0]["command"] in text


def test_longest_request_has_to_fit(tmp_path: Path):
    write(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="max_prompt=12 and max_output=8 are more than max_model_len=19"):
        run(str(tmp_path / "tiny.gguf"), max_model_len=19, **OPTIONS)


def test_device_and_commit_are_words():
    assert "CPU" in device_in_words() or " x " in device_in_words()
    assert (commit := source_commit()) is None or len(commit.removesuffix("+changes")) == 12
