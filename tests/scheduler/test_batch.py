"""The corridor, field by field, against batches written by hand."""

import time
import timeit
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.constraint_io import ConstraintDims, pack_slot
from jaxserve.request import LoadedAdapter, Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.batch import (
    ScheduledBatch,
    ScheduledRow,
    SlotArrays,
    all_buckets,
    build_inputs,
    choose_bucket,
    choose_sampling,
    first_chunk,
    slot_loads,
)
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step_io import Bucket, StepDims
from tests.scheduler.fake_engine import dims_of, make_request

CONFIG = SchedulerConfig(
    max_model_len=64, max_num_seqs=8, prefill_sizes=(2, 16), decode_sizes=(1, 4, 8), max_prefill_rows=3
)
DIMS = StepDims(num_slots=4, max_pages_per_seq=3, num_pages=10, page_size=4, max_stop_ids=3, max_loras=2)
DROPPED = 40  # NP * PS


def sequence_with(prompt: list[int], adapter: LoadedAdapter | None = None, **params) -> Sequence:
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        max_total_len=12,
        stop_token_ids=(7, 8),
        seed=(5 << 32) | 0xFFFFFFFF,
        adapter=adapter,
    )
    return Sequence(request, 0)


def test_all_buckets():
    assert all_buckets(CONFIG) == [
        (1, 0, 0), (4, 0, 0), (8, 0, 0),
        (0, 2, 2), (2, 2, 2),
        (0, 16, 3), (8, 16, 3),
    ]  # fmt: skip


def test_large_steps_that_read_prompts_have_places_to_decode_in_any_case():
    config = SchedulerConfig(max_model_len=64, max_num_seqs=8, prefill_sizes=(16, 2048), decode_sizes=(8,))
    assert all_buckets(config) == [(8, 0, 0), (0, 16, 4), (8, 16, 4), (8, 2048, 4)]
    assert choose_bucket(config, 0, 17) == choose_bucket(config, 8, 9) == (8, 2048, 4)


@pytest.mark.parametrize(
    ("num_decode_rows", "num_prefill_tokens", "expected"),
    [
        (1, 0, (1, 0, 0)),
        (2, 0, (4, 0, 0)),
        (8, 0, (8, 0, 0)),
        (0, 2, (0, 2, 2)),
        (1, 1, (2, 2, 2)),
        (1, 2, (8, 16, 3)),
        (0, 3, (0, 16, 3)),
        (8, 8, (8, 16, 3)),
    ],
)
def test_choose_bucket(num_decode_rows, num_prefill_tokens, expected):
    assert choose_bucket(CONFIG, num_decode_rows, num_prefill_tokens) == expected


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (1, [128]),
        (128, [128]),
        (129, [512]),  # two steps of 128 cost more than the padding
        (600, [512, 128]),
        (1024, [512, 512]),
        (1600, [2048]),
        (3000, [2048, 512, 512]),
        (4096, [2048, 2048]),
        (7000, [8192]),
        (8192, [8192]),
    ],
)
def test_prompts_are_cut_where_padding_costs_more(num_tokens, expected):
    sizes, found = (128, 512, 2048, 8192), []
    config = SchedulerConfig(
        max_model_len=64, max_num_seqs=8, prefill_sizes=sizes, decode_sizes=(8,), max_prefill_rows=3
    )
    while num_tokens > 0:
        found.append(choose_bucket(config, 0, first_chunk(sizes, num_tokens)).num_tokens)
        num_tokens -= found[-1]
    assert found == expected


@pytest.mark.parametrize(
    ("num_tokens", "num_decode_rows", "expected"),
    [
        (20, 100, [20]),  # a step of 128
        (29, 100, [29]),  # of 512: two of 128 cost more
        (600, 100, [412, 188]),  # both of 512
        (2000, 256, [1792, 208]),  # of 2048 and 512
        (5, 200, [5]),  # 128 are too few for the rows that decode
    ],
)
def test_prompts_are_cut_for_what_the_decode_rows_leave(num_tokens, num_decode_rows, expected):
    found = []
    while num_tokens > 0:
        found.append(first_chunk((128, 512, 2048, 8192), num_tokens, num_decode_rows))
        num_tokens -= found[-1]
    assert found == expected


def test_every_choice_is_a_known_bucket():
    choices = {choose_bucket(CONFIG, rows, tokens) for rows in range(9) for tokens in range(17 - rows) if rows + tokens}
    assert choices == set(all_buckets(CONFIG))


def test_a_sequence_that_runs_alone_reads_its_prompt_or_decodes():
    config = replace(CONFIG, max_num_seqs=1, decode_sizes=(1,), prefill_sizes=(2, 16, 2048))
    alone = [(1, 0, 0), (0, 2, 2), (0, 16, 3), (1, 2048, 3)]
    assert all_buckets(config) == alone
    assert {choose_bucket(config, *step) for step in ((1, 0), *((0, n) for n in range(1, 2049)))} == set(alone)
    assert all_buckets(replace(config, num_stages=2)) == [*alone[:2], (1, 2, 2), alone[2], (1, 16, 3), alone[3]]


def test_build_inputs_by_hand():
    """Bucket (3, 9, 2): two of three places to decode, one token on the device, and one chunk of four."""
    slots = SlotArrays(DIMS)
    here = sequence_with([11, 12, 13, 14, 15], temperature=0.5, top_p=0.25, min_p=0.125, top_k=9, min_tokens=2)
    there = sequence_with([21, 22, 23, 24], temperature=0.0, top_k=-1, logprobs=3)
    adapter = LoadedAdapter(name="a", slot=1, generation=3, rank=2)
    chunk = sequence_with([31, 32, 33, 34, 35, 36, 37, 38], adapter, logprobs=0)
    slots.assign(0, chunk.request, [0])  # which the next one to have the slot must not inherit
    slots.assign(2, here.request, [9, 1])
    slots.assign(0, there.request, [3])
    slots.add_page(0, 1, 7)
    slots.assign(3, chunk.request, [4, 5, 6])
    rows = (
        ScheduledRow(here, 2, 4, 1, True),
        ScheduledRow(there, 0, 4, 1, True),  # token 4 is not known yet
        ScheduledRow(chunk, 3, 2, 4, False),
    )
    buffer, inputs = build_inputs(ScheduledBatch(Bucket(3, 9, 2), rows, 2), slots, DIMS)

    assert buffer.dtype == np.int32
    expected = {
        "token_ids": [15, -1, 33, 34, 35, 36, 0, 0, 0],
        "positions": [4, 4, 2, 3, 4, 5, 0, 0, 0],
        "kv_write_index": [4, 28, 18, 19, 20, 21, DROPPED, DROPPED, DROPPED],
        "page_table": [[9, 1, 0], [3, 7, 0], [0, 0, 0], [4, 5, 6], [0, 0, 0]],
        "adapter_ids": [-1, -1, 1, 1, 1, 1, -1, -1, -1],
        "kv_lens": [5, 5, 0, 6, 0],
        "prefill_cu_q_lens": [2, 6, 6],
        "slot_ids": [2, 0, 4, 3, 4],
        "sample_index": [0, 1, 0, 5, 0],
        "does_sample": [1, 1, 0, 0, 0],
        "top_k": [9, 0, 0, 0, 0],
        "seed": [[5, -1], [5, -1], [0, 0], [5, -1], [0, 0]],
        "min_len": [7, 0, 0, 0, 0],
        "stop_ids": [[7, 8, -1], [-1] * 3, [-1] * 3, [-1] * 3, [-1] * 3],
        "num_logprobs": [-1, 3, -1, 0, -1],
        "temperature": [0.5, 0, 0, 1, 0],
        "top_p": [0.25, 1, 1, 1, 1],
        "min_p": [0.125, 0, 0, 0, 0],
        "constrained": [0, 0, 0, 0, 0],
    }
    for name, value in inputs._asdict().items():
        assert value.tolist() == expected[name], name
        assert np.shares_memory(value, buffer)


def test_two_chunks_lie_one_after_another():
    slots = SlotArrays(DIMS)
    first, second = sequence_with([1, 2, 3]), sequence_with([4, 5, 6, 7, 8])
    slots.assign(0, first.request, [0])
    slots.assign(1, second.request, [1, 2])
    rows = (ScheduledRow(first, 0, 0, 3, True), ScheduledRow(second, 1, 0, 5, True))
    _, inputs = build_inputs(ScheduledBatch(Bucket(4, 10, 3), rows, 0), slots, DIMS)
    assert inputs.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert inputs.prefill_cu_q_lens.tolist() == [0, 3, 8, 8]
    assert inputs.sample_index.tolist() == [0] * 4 + [2, 7, 0]
    assert inputs.kv_lens.tolist() == [0] * 4 + [3, 5, 0]
    assert inputs.slot_ids.tolist() == [4] * 4 + [0, 1, 4]


def test_row_index_counts_the_places_that_nobody_decodes_in():
    row = ScheduledRow(sequence_with([1]), 0, 0, 1, True)
    batch = ScheduledBatch(Bucket(8, 16, 3), (row,) * 4, 2)
    assert [batch.row_index(i) for i in range(4)] == [0, 1, 8, 9]


def test_a_slot_keeps_nothing_of_its_last_sequence():
    slots, fresh = SlotArrays(DIMS), SlotArrays(DIMS)
    loud = sequence_with([1], temperature=2.0, top_p=0.5, min_p=0.5, top_k=4, min_tokens=3, logprobs=5)
    slots.assign(1, loud.request, [1, 2, 3])
    plain = sequence_with([1, 2], temperature=0.0)
    slots.assign(1, plain.request, [8])
    fresh.assign(1, plain.request, [8])
    for name, value in vars(slots).items():
        assert np.array_equal(value, getattr(fresh, name)), name


def test_values_outside_32_bits_stay_finite_and_in_range():
    slots = SlotArrays(DIMS)
    params = {"temperature": 1e300, "top_p": 1e-300, "top_k": 2**40, "min_tokens": 2**40}
    slots.assign(0, sequence_with([1], **params).request, [0])
    assert np.isfinite(slots.temperature[0]) and slots.temperature[0] > 1e38
    assert 0 < slots.top_p[0] < 1e-37
    assert slots.top_k[0] == 2**31 - 1
    assert slots.min_len[0] == 12  # never reached before max_total_len


def test_256_decode_rows_take_less_than_a_millisecond():
    cache = CacheConfig(num_pages=256 * 16, page_size=16)
    config = SchedulerConfig(
        max_model_len=2048, max_num_seqs=256, prefill_sizes=(8192,), decode_sizes=(256,), max_prefill_rows=256
    )
    scheduler = Scheduler(cache, config, dims_of(cache, config))
    for i in range(256):
        scheduler.add(make_request(f"r{i}", [i % 11] * 30, 100, eos=False))
    assert scheduler.schedule() is not None
    batch = scheduler.schedule()
    assert batch is not None and batch.bucket == (256, 0, 0) and len(batch.rows) == 256
    # CPU time, the best of many: the machine may be busy, the code is not slower for that.
    seconds = timeit.repeat(
        lambda: build_inputs(batch, scheduler.slots, scheduler.dims), timer=time.process_time, number=1, repeat=50
    )
    assert min(seconds) < 1e-3


def test_constraints_are_sent_once_for_each_time_that_a_slot_is_taken():
    cache = CacheConfig(num_pages=8, page_size=2, prefix_caching=False)
    config = SchedulerConfig(max_model_len=8, max_num_seqs=2, prefill_sizes=(8,), decode_sizes=(2,))
    dims = dims_of(cache, config)
    scheduler = Scheduler(cache, config, dims)
    scheduler.add(make_request("free", [5, 6], 5))
    scheduler.add(make_request("bound", [7, 8], 5, presence_penalty=1.0))
    of = ConstraintDims.of(dims, 100)
    first = scheduler.schedule()
    assert first is not None and [s.request_id for s in first.constrained] == ["bound"]
    (load,) = slot_loads(first, of)
    bound = scheduler.get("bound")
    assert bound is not None
    np.testing.assert_array_equal(load, pack_slot(bound.slot, bound.request, [7, 8], of))
    inputs = build_inputs(first, scheduler.slots, dims)[1]
    assert inputs.slot_ids[inputs.constrained == 1].tolist() == [bound.slot]
    assert choose_sampling(inputs) == "constrained"
    scheduler.commit(first, np.full(first.bucket.num_rows, 9, np.int32))
    second = scheduler.schedule()
    assert second is not None and second.constrained == () and slot_loads(second, of) == []
    scheduler.forget_computed()  # preempts both; they come back with what they have said
    scheduler.commit(second, np.full(second.bucket.num_rows, 4, np.int32))
    third = scheduler.schedule()
    assert third is not None and [s.request_id for s in third.constrained] == ["bound"]
    np.testing.assert_array_equal(slot_loads(third, of)[0], pack_slot(bound.slot, bound.request, [7, 8, 9, 4], of))
