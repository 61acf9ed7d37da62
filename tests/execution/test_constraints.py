"""Each constraint changes a row's logits exactly as a numpy reference says, whoever had its slot before."""

from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.constraint_io import (
    MAX_BAD_LEN,
    MAX_BAD_SEQUENCES,
    MAX_BIASES,
    ConstraintDims,
    new_slot,
    pack_slot,
    set_bits,
)
from jaxserve.execution import constraints
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.step_io import Bucket, StepDims, StepInputs, new_inputs
from tests.constraint_reference import constrained_logits

V, SLOTS, ROWS = 300, 5, 3
DIMS = ConstraintDims(SLOTS, V, 40)
PROMPT, OUTPUT = [3, 9, 9, 250], [9, 7, 7, 7, 1, 2]
OUTPUTS = ([], OUTPUT, [5, *range(MAX_BAD_LEN - 1)])

load = jax.jit(partial(constraints.load, dims=DIMS))
constrain = jax.jit(constraints.constrain)
record = jax.jit(constraints.record)

FIELDS: dict[str, list[dict[str, Any]]] = {
    "presence_penalty": [{"presence_penalty": 1.5}, {"presence_penalty": -2.0}],
    "frequency_penalty": [{"frequency_penalty": 0.7}, {"frequency_penalty": -0.1}],
    "repetition_penalty": [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.5}, {"repetition_penalty": 1e30}],
    "logit_bias": [{"logit_bias": {7: 2.5, 250: -100.0, 299: 100.0}}, {"logit_bias": dict.fromkeys(range(V), -3.0)}],
    "allowed_token_ids": [{"allowed_token_ids": (0, 31, 32, 63, 64, 299)}, {"allowed_token_ids": tuple(range(V))}],
    "bad_sequences": [
        {"bad_sequences": ((7,), (299,))},
        {"bad_sequences": ((1, 2, 5), (2, 6), (2, 7, 8), (7, 1, 2, 9), (3, 9, 9, 250, 9, 7, 7, 7, 1, 2, 11))},
        {"bad_sequences": (tuple(range(MAX_BAD_LEN)), (*range(20, 19 + MAX_BAD_LEN), 2))},
        {"bad_sequences": ((*OUTPUT, 100), (250, *OUTPUT, 101))},  # the prompt is no part of a bad word
        {"bad_sequences": tuple((2, 20 + i) for i in range(MAX_BAD_SEQUENCES))},
    ],
}
CASES = [pytest.param(case, id=f"{name}{i}") for name, cases in FIELDS.items() for i, case in enumerate(cases)]


def request(prompt: list[int] = PROMPT, *, bad_sequences: tuple[tuple[int, ...], ...] = (), **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        max_total_len=40,
        stop_token_ids=(),
        seed=0,
        bad_sequences=bad_sequences,
    )


def empty() -> constraints.Constraints:
    """What slots may hold that nobody has taken: anything."""
    return jax.tree.map(lambda s: jnp.full(s.shape, 77, s.dtype), constraints.constraints_shape(DIMS))


def step(slots: list[int], constrained: list[int], does_sample: list[int]) -> StepInputs:
    dims = StepDims(num_slots=SLOTS, max_pages_per_seq=40, num_pages=40, page_size=1)
    inputs = new_inputs(Bucket(ROWS, 0, 0), dims)[1]
    inputs.slot_ids[: len(slots)] = slots
    inputs.constrained[: len(slots)] = constrained
    inputs.does_sample[: len(slots)] = does_sample
    return inputs


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (ROWS, V)).astype(np.float32)


def assert_same(got: Any, want: np.ndarray) -> None:
    got = np.asarray(got, np.float64)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    free = ~np.isneginf(want)
    np.testing.assert_allclose(got[free], want[free], rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_case_changes_something(case):
    raw = logits()[0]
    changes = [(constrained_logits(raw, request(**case), output) != raw).any() for output in OUTPUTS]
    assert any(changes) or case == {"allowed_token_ids": tuple(range(V))}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("output", OUTPUTS, ids=["first", "later", "long"])
def test_one_field(case, output):
    asked = request(**case)
    assert asked.is_constrained
    held = load(empty(), pack_slot(4, asked, PROMPT + output, DIMS))
    raw = logits()
    got = np.asarray(constrain(raw, held, step([1, 4], [0, 1], [1, 1])))
    want = constrained_logits(raw[1], asked, output)
    assert_same(got[1], want)
    np.testing.assert_array_equal(got[[0, 2]], raw[[0, 2]])  # rows without constraints, whatever their slots hold


@pytest.mark.parametrize("names", list(combinations(FIELDS, 2)), ids="+".join)
def test_two_fields(names):
    asked = request(**FIELDS[names[0]][0], **FIELDS[names[1]][0])
    held = load(empty(), pack_slot(0, asked, PROMPT + OUTPUT, DIMS))
    assert_same(constrain(logits(), held, step([0], [1], [1]))[0], constrained_logits(logits()[0], asked, OUTPUT))


def test_what_is_sampled_counts_at_the_next_step():
    """Slots change hands, rows change places, some rows do not sample: every step as the reference says."""
    r = np.random.default_rng(1)
    held, owners = empty(), {}  # slot -> (request, output)
    for number in range(40):
        if len(owners) < 3 or r.random() < 0.3:
            slot = int(r.integers(SLOTS))
            prompt = r.integers(0, 12, int(r.integers(1, 9))).tolist()
            output = r.integers(0, 12, int(r.integers(0, 5))).tolist()  # as after a preemption
            asked = request(
                prompt,
                presence_penalty=float(r.normal()),
                frequency_penalty=float(r.uniform(-1, 1)),
                repetition_penalty=float(r.uniform(0.5, 2)),
                bad_sequences=tuple(tuple(r.integers(0, 12, int(r.integers(1, 4))).tolist()) for _ in range(20)),
            )
            owners[slot] = (asked, output)
            held = load(held, pack_slot(slot, asked, prompt + output, DIMS))
        slots = r.permutation(list(owners))[:ROWS].tolist()
        does_sample = r.integers(0, 2, len(slots)).tolist()
        inputs = step(slots, [1] * len(slots), does_sample)
        raw = logits(number)
        changed = np.asarray(constrain(raw, held, inputs))
        tokens = r.integers(0, 12, ROWS).astype(np.int32)
        held = record(held, tokens, inputs)
        for row, slot in enumerate(slots):
            asked, output = owners[slot]
            assert_same(changed[row], constrained_logits(raw[row], asked, output))
            if does_sample[row]:
                output.append(int(tokens[row]))


def test_only_allowed_tokens_keep_their_logits():
    r = np.random.default_rng(4)
    words = np.full((ROWS, DIMS.num_words), -1, np.int32)
    free = logits()
    np.testing.assert_array_equal(constraints.allow(jnp.array(free), jnp.array(words)), free)
    want = np.array(free)
    for row in (0, 2):
        kept = np.flatnonzero(r.integers(0, 2, V))
        set_bits(words[row], range(32 * DIMS.num_words), False)
        set_bits(words[row], kept, True)
        want[row, np.setdiff1d(np.arange(V), kept)] = -np.inf
    np.testing.assert_array_equal(jax.jit(constraints.allow)(free, words), want)


def test_a_load_without_a_slot_changes_nothing():
    before = empty()
    after = load(before, new_slot(DIMS)[0])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_largest_request_fits():
    asked = request(
        logit_bias={i: 1.0 for i in range(V)},
        bad_sequences=((1, *range(2, 1 + MAX_BAD_LEN)),) * MAX_BAD_SEQUENCES,
    )
    assert V <= MAX_BIASES
    packed = pack_slot(0, asked, list(range(40)), DIMS)
    assert packed.dtype == np.int32
    held = load(empty(), packed)
    assert int(held.seen[0, 0]) == 1 + 0 and int(held.seen[0, 39]) == 2 and held.recent[0].tolist() == [*range(25, 40)]
