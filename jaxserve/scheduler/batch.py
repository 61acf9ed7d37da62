"""The corridor: a scheduled batch becomes the numpy inputs of one step. Buckets and padding are decided here only."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.constraint_io import FLOAT32_MAX, FLOAT32_TINY, ConstraintDims, pack_slot
from jaxserve.request import Request
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step_io import Bucket, Sampling, StepDims, StepInputs, new_inputs

# What a step costs besides its tokens, in tokens: reading the weights takes as long as multiplying some 220 (an 8B
# model in bfloat16 on an H100); with the rest of a step about this many.
STEP_TOKENS = 256
# Larger steps that read prompts have places for decode rows even where none decodes: what these cost, the sampler of
# more rows and a kernel that finds nothing to do, is little beside the prompts, and a shape to compile is saved.
PROMPTS_ALONE = 1024
INT32_MAX = 2**31 - 1


def all_buckets(config: SchedulerConfig) -> list[Bucket]:
    """Every bucket that ``choose_bucket`` can return: what the runner compiles before it is ready."""
    buckets = [Bucket(size, 0, 0) for size in config.decode_sizes]
    # A sequence that runs alone reads its prompt or decodes. With stages a step of the next one can meet its last.
    is_alone = config.max_num_seqs == config.num_stages == 1
    for tokens in config.prefill_sizes:
        rows = min(config.max_prefill_rows, tokens)
        if tokens <= PROMPTS_ALONE:
            buckets.append(Bucket(0, tokens, rows))
        if tokens > PROMPTS_ALONE or not is_alone:
            buckets.append(Bucket(min(config.max_num_seqs, tokens), tokens, rows))
    return buckets


def choose_bucket(config: SchedulerConfig, num_decode_rows: int, num_prefill_tokens: int) -> Bucket:
    """The smallest bucket that holds so many decode rows and, beside their tokens, so many prompt tokens.

    Beside prompt tokens there are no decode rows, or places for all of them: the number of shapes to compile stays the
    sum, not the product, of the two size lists. A place that no row takes costs little, since its token is a prompt's.
    """
    if num_prefill_tokens == 0:
        return Bucket(_smallest(config.decode_sizes, num_decode_rows), 0, 0)
    tokens = _smallest(config.prefill_sizes, num_decode_rows + num_prefill_tokens)
    has_decode_rows = num_decode_rows or tokens > PROMPTS_ALONE
    return Bucket(
        min(config.max_num_seqs, tokens) if has_decode_rows else 0, tokens, min(config.max_prefill_rows, tokens)
    )


def common_bucket(config: SchedulerConfig, buckets: list[Bucket]) -> Bucket:
    """The smallest of ``all_buckets`` that has room for a step of each of ``buckets``, one at least."""
    if all(bucket == buckets[0] for bucket in buckets):
        return buckets[0]
    if not any(bucket.prefill_tokens for bucket in buckets):
        return Bucket(max(bucket.decode_rows for bucket in buckets), 0, 0)
    tokens = _smallest(config.prefill_sizes, max(bucket.num_tokens for bucket in buckets))
    has_decode_rows = any(bucket.decode_rows for bucket in buckets) or tokens > PROMPTS_ALONE
    return Bucket(
        min(config.max_num_seqs, tokens) if has_decode_rows else 0, tokens, min(config.max_prefill_rows, tokens)
    )


def first_chunk(sizes: tuple[int, ...], num_prompt_tokens: int, num_decode_rows: int = 0) -> int:
    """Prompt tokens of the first of the steps that read ``num_prompt_tokens`` at the least cost, each beside the tokens
    of ``num_decode_rows``.

    A step costs its padded size and ``STEP_TOKENS`` more. So 4,096 tokens are two steps of 2,048 and not one of 8,192,
    and 1,900 are one of 2,048.
    """
    room = [(size - num_decode_rows, size + STEP_TOKENS) for size in sizes if size > num_decode_rows]
    return min(num_prompt_tokens, _cheapest_cut(room, num_prompt_tokens)[0])


def _cheapest_cut(room: list[tuple[int, int]], num_tokens: int) -> tuple[int, int]:
    """(room of the first step, cost of all); ``room`` has prompt tokens and cost of each size of step, ascending."""
    within = [step for step in room if step[0] <= num_tokens]
    padded = next((step for step in room if step[0] >= num_tokens), None)
    options = []
    if padded is not None:
        options.append(padded)
    if within:
        tokens, cost = within[-1]
        left = num_tokens - tokens
        options.append((tokens, cost + (_cheapest_cut(room, left)[1] if left else 0)))
    return min(options, key=lambda option: (option[1], -option[0]))  # of equals the fewer steps


def choose_sampling(inputs: StepInputs) -> Sampling:
    """The least that gives every row of a step what it asks for. Padding rows ask for nothing."""
    if (inputs.constrained & inputs.does_sample).any():
        return "constrained"
    if (
        (inputs.num_logprobs > 0).any()
        or (inputs.kv_lens < inputs.min_len).any()
        or ((inputs.temperature > 0) & ((inputs.top_k > 0) | (inputs.top_p < 1))).any()
    ):
        return "any"
    return "random" if (inputs.temperature > 0).any() else "greedy"


def _smallest(sizes: tuple[int, ...], num: int) -> int:
    return next(size for size in sizes if size >= num)


class ScheduledRow(NamedTuple):
    """One sequence's part in a step: tokens ``start .. start + num_new_tokens - 1`` of the sequence."""

    sequence: Sequence
    slot: int  # of the sequence when it was scheduled: the row outlives an abort
    start: int
    num_new_tokens: int
    samples: bool  # the row reaches the end of its sequence, so a token is sampled
    attempt: int = 0  # times that the sequence was preempted before


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """What one step computes: ``num_decode_rows`` rows that decode, then those that have a chunk of a prompt."""

    bucket: Bucket
    rows: tuple[ScheduledRow, ...]
    num_decode_rows: int
    constrained: tuple[Sequence, ...] = ()  # given a slot just now, which the step's sampler must know (``slot_loads``)

    def row_index(self, i: int) -> int:
        """Row of the step's arrays ([B]) that ``rows[i]`` occupies: the chunks' come after all places to decode."""
        return i if i < self.num_decode_rows else i - self.num_decode_rows + self.bucket.decode_rows


class SlotArrays:
    """Host copy of what the step needs of each slot, written at admission and when a page is added.

    A step's rows are then filled by fancy indexing with the rows' slots. Written by the Scheduler only.
    """

    def __init__(self, dims: StepDims):
        num_slots = dims.num_slots
        self.page_table = np.zeros((num_slots, dims.max_pages_per_seq), np.int32)  # [R, MP], unused entries 0
        self.adapter = np.full(num_slots, -1, np.int32)  # slot of the adapter; -1: none
        self.top_k = np.zeros(num_slots, np.int32)
        self.seed = np.zeros((num_slots, 2), np.int32)  # [R, 2]
        self.min_len = np.zeros(num_slots, np.int32)
        self.stop_ids = np.full((num_slots, dims.max_stop_ids), -1, np.int32)  # [R, NS]
        self.num_logprobs = np.full(num_slots, -1, np.int32)
        self.constrained = np.zeros(num_slots, np.int32)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)

    def assign(self, slot: int, request: Request, pages: list[int]) -> None:
        """Write everything of ``slot`` for the sequence that takes it."""
        params = request.params
        self.page_table[slot] = 0
        self.page_table[slot, : len(pages)] = pages
        self.adapter[slot] = -1 if request.adapter is None else request.adapter.slot
        self.top_k[slot] = min(max(params.top_k, 0), INT32_MAX)
        self.seed[slot] = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        self.stop_ids[slot] = -1
        self.min_len[slot] = 0
        if params.min_tokens > 0:
            # No output is longer than max_total_len, and min_tokens alone may exceed an int32.
            self.min_len[slot] = min(len(request.prompt_token_ids) + params.min_tokens, request.max_total_len)
            self.stop_ids[slot, : len(request.stop_token_ids)] = request.stop_token_ids
        self.constrained[slot] = request.is_constrained
        self.num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        # A float64 that rounds to inf, or top_p to 0, would turn logits into NaN or keep no token at all.
        self.temperature[slot] = min(params.temperature, FLOAT32_MAX)
        self.top_p[slot] = max(params.top_p, FLOAT32_TINY)
        self.min_p[slot] = params.min_p

    def add_page(self, slot: int, index: int, page: int) -> None:
        self.page_table[slot, index] = page


PER_SLOT_FIELDS = (
    "page_table", "top_k", "seed", "min_len", "stop_ids", "num_logprobs", "constrained", "temperature",
    "top_p", "min_p",
)  # fmt: skip
PER_TOKEN_FIELDS = frozenset({"token_ids", "positions", "kv_write_index", "adapter_ids"})


def slot_loads(batch: ScheduledBatch, dims: ConstraintDims) -> list[np.ndarray]:
    """What the device must be told of slots before ``batch``. Call it when ``build_inputs`` is called."""
    return [pack_slot(s.slot, s.request, s.tokens, dims) for s in batch.constrained]


def build_inputs(batch: ScheduledBatch, slots: SlotArrays, dims: StepDims) -> tuple[np.ndarray, StepInputs]:
    """The step's int32 buffer and the ``StepInputs`` views into it, padding included.

    Call it after ``schedule`` and before the scheduler's next change: ``slots`` and the sequences' tokens are read as
    they are now. A token that the sequence does not have yet is on the device: its id is -1.
    """
    buffer, inputs = new_inputs(batch.bucket, dims)
    rows, num_decode, first_prefill = batch.rows, batch.num_decode_rows, batch.bucket.decode_rows
    if not rows:
        return buffer, inputs
    page_size = dims.page_size

    # Per row, in the order of batch.rows; t: where its first token lies in [T].
    sequences, slots_of, starts, *others, _ = zip(*rows, strict=True)
    slot, start, num_new, samples = (np.array(column, np.int32) for column in (slots_of, starts, *others))
    t = np.cumsum(num_new, dtype=np.int32) - num_new
    ends = num_decode + np.cumsum(num_new[num_decode:])

    # Where those that decode lie in [B], and those that have chunks; and in the order of batch.rows.
    places = [(slice(num_decode), slice(num_decode))]
    if len(rows) > num_decode:
        last = first_prefill + len(rows) - num_decode
        places.append((slice(first_prefill, last), slice(num_decode, len(rows))))
    for here, there in places:
        inputs.slot_ids[here] = slot[there]
        inputs.kv_lens[here] = start[there] + num_new[there]
        inputs.does_sample[here] = samples[there]
        inputs.sample_index[here] = t[there] + num_new[there] - 1
        for name in PER_SLOT_FIELDS:  # straight to its place: "clip" has numpy write without a copy between
            getattr(slots, name).take(slot[there], axis=0, out=getattr(inputs, name)[here], mode="clip")
    inputs.prefill_cu_q_lens[0] = num_decode
    inputs.prefill_cu_q_lens[1 : len(ends) + 1] = ends
    inputs.prefill_cu_q_lens[len(ends) + 1 :] = ends[-1] if len(ends) else num_decode

    inputs.token_ids[:num_decode] = [
        tokens[i] if i < len(tokens) else -1
        for tokens, i in zip([s.tokens for s in sequences[:num_decode]], starts, strict=False)
    ]
    for row, first in zip(rows[num_decode:], t[num_decode:].tolist(), strict=True):
        chunk = row.sequence.tokens[row.start : row.start + row.num_new_tokens]
        inputs.token_ids[first : first + row.num_new_tokens] = chunk

    # Per token: its row (as an index into the arrays above) and its position.
    token_row = np.repeat(np.arange(len(rows)), num_new)
    position = start[token_row] + np.arange(len(token_row)) - t[token_row]
    inputs.positions[: len(position)] = position
    page = slots.page_table[slot[token_row], position // page_size]
    inputs.kv_write_index[: len(position)] = page * page_size + position % page_size
    if dims.max_loras:
        inputs.adapter_ids[: len(position)] = slots.adapter[slot[token_row]]
    return buffer, inputs


def laid_out(
    batch: ScheduledBatch, inputs: StepInputs, bucket: Bucket, dims: StepDims
) -> tuple[ScheduledBatch, np.ndarray, StepInputs]:
    """``batch``, its buffer and its ``inputs`` (``build_inputs``) as they are in a larger ``bucket``: rows that have
    chunks lie elsewhere, tokens where they were."""
    buffer, out = new_inputs(bucket, dims)
    num_decode, num_prefill = batch.num_decode_rows, len(batch.rows) - batch.num_decode_rows
    num_tokens = sum(row.num_new_tokens for row in batch.rows)
    old, new = batch.bucket.decode_rows, bucket.decode_rows
    for name, source, target in zip(StepInputs._fields, inputs, out, strict=True):
        if source is None:
            continue
        if name in PER_TOKEN_FIELDS:
            target[:num_tokens] = source[:num_tokens]
        elif name == "prefill_cu_q_lens":
            target[: num_prefill + 1], target[num_prefill + 1 :] = source[: num_prefill + 1], source[num_prefill]
        else:
            target[:num_decode] = source[:num_decode]
            target[new : new + num_prefill] = source[old : old + num_prefill]
    return replace(batch, bucket=bucket), buffer, out
