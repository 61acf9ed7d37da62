"""Golden models: what ``scripts/make_golden_models.py`` recorded, and the logits of an engine to compare with it.

A folder of ``tests/data/golden`` is a tiny random checkpoint as transformers saved it, and the float32 logits that
transformers computed for one greedy sequence.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve import Engine
from jaxserve.execution.runner import Computed
from jaxserve.step_io import Bucket, Sampling, new_inputs, num_elements, sampling_shapes

FOLDER = Path(__file__).parents[1] / "data" / "golden"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/golden.json"))
assert NAMES, f"{FOLDER} has no models"
TOLERANCE = 2e-4  # relative to the largest logit of a position


@dataclass(frozen=True)
class Golden:
    """One model and its sequence, ``prompt + tokens``; ``logits`` [P + N - 1, V] f32 are those after each of its tokens
    but the last. ``max_model_len`` is what an engine has to be started with (longrope goes by it)."""

    folder: Path
    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray
    max_model_len: int

    @property
    def sampled_lengths(self) -> range:
        """Lengths of the sequence after which its new tokens are sampled."""
        return range(len(self.prompt), len(self.prompt) + len(self.tokens))


def load(name: str) -> Golden:
    folder = FOLDER / name
    record = json.loads((folder / "golden.json").read_text())
    with np.load(folder / "golden.npz") as arrays:
        logits = arrays["logits"]
    golden = Golden(
        folder, record["prompt_token_ids"], record["new_token_ids"], logits, max_model_len=record["max_model_len"]
    )
    assert len(logits) == len(golden.prompt) + len(golden.tokens) - 1
    return golden


def with_old_keys(golden: Golden, folder: Path) -> Path:
    """``folder`` as the same checkpoint with the ``config.json`` of transformers 4."""
    for path in golden.folder.iterdir():
        if path.name != "config.json":
            os.symlink(path, folder / ("config.json" if path.name == "config_old_keys.json" else path.name))
    return folder


def engine(golden: Golden, **options: Any) -> Engine:
    """A float32 engine whose pages and prompt chunks are smaller than the prompt; one row, so few shapes to compile."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "page_size": 4,
        "prefill_sizes": (8,),
        "max_model_len": golden.max_model_len,
        "max_num_seqs": 1,
        "max_prefill_rows": 1,
        "num_pages": -(-golden.max_model_len // 4),
        "samplings": ("greedy",),
    }
    return Engine.from_pretrained(golden.folder, **(defaults | options))


@contextmanager
def sampled_logits(engine: Engine) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Collects (length of the sequence, logits [V]) of every token that ``engine`` samples, in order.

    Logits never leave the device for a user, so this reads them where the runner hands them to a sampler.
    """
    runner, seen = engine.loop.runner, list[tuple[int, np.ndarray]]()
    sample = runner.sample

    def watched(computed: Computed, asked: Sampling, allowed: np.ndarray | None = None) -> jax.Array:
        buffer, views = new_inputs(Bucket(computed.num_rows, 0, 0), runner.dims)
        size = num_elements(sampling_shapes(computed.num_rows, runner.dims))
        buffer[:size] = np.asarray(computed.inputs)[-1, :size]  # the last stage's
        values = np.asarray(computed.logits)[:, : runner.config.vocab_size]  # a mesh pads V
        seen.extend((int(views.kv_lens[row]), values[row]) for row in np.flatnonzero(views.does_sample))
        return sample(computed, asked, allowed)

    runner.sample = watched
    try:
        yield seen
    finally:
        runner.sample = sample


def check_logits(golden: Golden, seen: list[tuple[int, np.ndarray]], lengths: Sequence[int]) -> None:
    """Raises AssertionError unless ``seen`` are the golden sequence's logits after ``lengths`` of its tokens, each once
    and to ``TOLERANCE``."""
    assert sorted(length for length, _ in seen) == sorted(lengths)
    for length, logits in seen:
        expected = golden.logits[length - 1]
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE, f"{golden.folder.name}: after {length} tokens the logits differ by {error:.1e}"
