"""Perplexity by sliding windows, against an oracle that has no cache."""

import json
import math

import numpy as np
import pytest

from jaxserve.bench.perplexity import perplexity, windows
from jaxserve.cli.app import run
from tests import tiny
from tests.checkpoint.tiny_gguf import write
from tests.oracle import oracle_logits


@pytest.mark.parametrize("num_tokens, window, stride", [(2, 8, 3), (8, 8, 1), (9, 8, 7), (40, 8, 3), (41, 16, 8)])
def test_windows_score_every_token_but_the_first_once(num_tokens, window, stride):
    seen = []
    for start, stop, scored in windows(num_tokens, window, stride):
        assert stop - start <= window and start < scored < stop
        assert start == 0 or scored - start >= window - stride
        seen += range(scored, stop)
    assert seen == list(range(1, num_tokens))


def test_perplexity_is_the_oracles():
    ids = np.random.default_rng(4).integers(2, tiny.CONFIG.vocab_size, 43).tolist()
    want = 0.0
    for start, stop, scored in windows(len(ids), 15, 9):
        logits = oracle_logits(tiny.CONFIG, tiny.params(), ids[start:stop])
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        want -= sum(logits[i - start - 1, ids[i]] for i in range(scored, stop))
    seen = []
    options = {"max_model_len": 16, "max_num_seqs": 1, "num_pages": 8, "prefill_sizes": (16,), "max_prefill_rows": 1}
    with tiny.engine(samplings=("any",), **options) as engine:
        found = perplexity(engine, ids, stride=9, on_progress=lambda *step: seen.append(step))
        with pytest.raises(ValueError, match="window=16 is not between 2 and 15"):
            perplexity(engine, ids, window=16)
        with pytest.raises(ValueError, match="stride=8 is not between 1 and 7: window=8"):
            perplexity(engine, ids, window=8, stride=8)
        with pytest.raises(ValueError, match="the text has 1 tokens, at least 2 are needed"):
            perplexity(engine, ids[:1])
    assert (found.num_tokens, found.num_scored, found.num_windows, found.window) == (43, 42, 5, 15)
    assert seen[0] == ("evaluate", 0, 5) and seen[-1] == ("evaluate", 5, 5)
    assert found.nll == pytest.approx(want / 42, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(want / 42), rel=1e-4)


def test_the_command(tmp_path, capsys):
    model, text = str(write(tmp_path / "tiny.gguf")), tmp_path / "text"
    text.write_text("Some text that is predicted badly.")
    arguments = ["eval", "perplexity", model, "--text", str(text)]
    options = ["--max-model-len", "16", "--max-num-seqs", "1", "--num-pages", "4", "--prefill-sizes", "16"]
    assert run([*arguments, *options, "--max-tokens", "20", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["num_tokens"] == 20 and row["num_scored"] == 19 and row["window"] == 15 and row["stride"] == 7
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    assert run([*arguments, "--max-tokens", "1"]) == 2
    assert "max_tokens=1: at least 2 are needed" in capsys.readouterr().err
    text.write_bytes(b"ab\xff")
    assert run(arguments) == 2
    assert "is not UTF-8: invalid start byte at byte 2" in capsys.readouterr().err
