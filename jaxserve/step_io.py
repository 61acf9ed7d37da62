"""What crosses the corridor between the host wing and the device wing: numpy in, one small array out.

A step is a flat batch of ``T`` tokens in ``B = BD + BP`` rows:

* rows ``0..BD-1`` decode, one token each: token ``i`` belongs to row ``i``. Of BD places the first ones are taken;
* rows ``BD..B-1`` have chunks of prompts, which lie one after another behind the tokens of the rows that decode
  (``prefill_cu_q_lens`` has their starts).

A row with one new token may be of either kind. All inputs of a step live in ONE int32 buffer (floats bit-cast),
so that a step costs one host-to-device copy; ``StepInputs`` are numpy views into it. What sampling reads comes
first: where it lies depends on B alone.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

Array = Any  # numpy on the host, jax inside the step


class Bucket(NamedTuple):
    """The padded shape of a step: the whole compile key."""

    decode_rows: int  # BD
    prefill_tokens: int  # T of a step that reads prompts, the tokens of its decode rows among them; else 0
    prefill_rows: int  # BP, 0 exactly when prefill_tokens is 0

    @property
    def num_tokens(self) -> int:  # T
        return self.prefill_tokens or self.decode_rows

    @property
    def num_rows(self) -> int:  # B
        return self.decode_rows + self.prefill_rows


@dataclass(frozen=True, kw_only=True)
class StepDims:
    """Sizes that every step of one engine shares."""

    num_slots: int  # R
    max_pages_per_seq: int  # MP
    num_pages: int  # NP
    page_size: int  # PS
    max_stop_ids: int = 16  # NS: ids a row may suppress until min_tokens
    max_logprobs: int = 20  # KL
    max_loras: int = 0  # LA: adapter slots; 0: the inputs have no adapter_ids
    hidden_tokens: int = 0  # TH: tokens of the largest step, whose hidden states stay until the next; 0: none do


class StepInputs(NamedTuple):
    """Views into one step's buffer. Padding: see each field. Shapes by ``input_shapes``."""

    kv_lens: Array  # [B] i32, tokens of the row's sequence after this step; padding 0
    slot_ids: Array  # [B] i32, engine slot; padding R
    does_sample: Array  # [B] i32, 1 where the row's chunk reaches the sequence's end
    top_k: Array  # [B] i32, 0 = off
    seed: Array  # [B, 2] i32 (bits of a u64: high, low)
    min_len: Array  # [B] i32, while kv_len < min_len the row's stop_ids are suppressed; 0 = off
    stop_ids: Array  # [B, NS] i32, padding -1
    num_logprobs: Array  # [B] i32, -1 = none asked, 0 = the sampled token's only
    constrained: Array  # [B] i32, 1 where the slot's constraints on the device (``constraint_io``) hold for the row
    temperature: Array  # [B] f32, 0 = greedy
    top_p: Array  # [B] f32, 1 = off
    min_p: Array  # [B] f32, 0 = off
    # The last that sampling reads (``SAMPLING_FIELDS``). From here on the forward pass's own.
    token_ids: Array  # [T] i32; -1: the last token of the row's slot (decode rows only); padding 0
    positions: Array  # [T] i32, index of the token in its sequence; padding 0
    kv_write_index: Array  # [T] i32, page * PS + offset in the page; padding NP * PS (dropped)
    page_table: Array  # [B, MP] i32, page ids; unused entries 0
    prefill_cu_q_lens: Array  # [BP + 1] i32, first tokens of the chunks; padding rows repeat the last
    sample_index: Array  # [B] i32, flat token whose logits the row samples from; padding 0
    adapter_ids: Array = None  # [T] i32, slot of the token's adapter, -1 for none; padding -1; None where LA is 0


# What a step's rows ask of sampling, each more than the one before: the best token; temperature and min_p; anything of
# their inputs; penalties, biases and tokens that may not be sampled, which are the device's own (``constraint_io``).
Sampling = Literal["greedy", "random", "any", "constrained"]
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "random", "any", "constrained")


class StepOutputs(NamedTuple):
    """Read from the device one step late."""

    tokens: Array  # [B] i32
    logprobs: Array  # [B] f32, of the sampled token, raw distribution
    top_ids: Array  # [B, KL] i32
    top_logprobs: Array  # [B, KL] f32, raw distribution, descending


FLOAT_FIELDS = ("temperature", "top_p", "min_p")
SAMPLING_FIELDS = StepInputs._fields[: StepInputs._fields.index("token_ids")]


def sampling_shapes(num_rows: int, dims: StepDims) -> dict[str, tuple[int, ...]]:
    """Shape of every field that sampling reads, in buffer order."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SAMPLING_FIELDS, (num_rows,))
    return shapes | {"seed": (num_rows, 2), "stop_ids": (num_rows, dims.max_stop_ids)}


def input_shapes(bucket: Bucket, dims: StepDims) -> dict[str, tuple[int, ...]]:
    """Shape of every field of ``StepInputs``, in buffer order."""
    t, b = bucket.num_tokens, bucket.num_rows
    shapes: dict[str, tuple[int, ...]] = sampling_shapes(b, dims) | {
        "token_ids": (t,),
        "positions": (t,),
        "kv_write_index": (t,),
        "page_table": (b, dims.max_pages_per_seq),
        "prefill_cu_q_lens": (bucket.prefill_rows + 1,),
        "sample_index": (b,),
    }
    return shapes | {"adapter_ids": (t,)} if dims.max_loras else shapes


def buffer_size(bucket: Bucket, dims: StepDims) -> int:
    """Elements of the int32 buffer that holds a step's inputs."""
    return num_elements(input_shapes(bucket, dims))


def num_elements(shapes: dict[str, tuple[int, ...]]) -> int:
    """Of all fields together."""
    return sum(math.prod(s) for s in shapes.values())


def new_inputs(bucket: Bucket, dims: StepDims) -> tuple[np.ndarray, StepInputs]:
    """A buffer whose every row is padding, and the views into it."""
    padding, places = _padding(bucket, dims)
    buffer = padding.copy()
    return buffer, _views(buffer, places)


def _views(buffer: np.ndarray, places: dict[str, tuple[slice, tuple[int, ...]]]) -> StepInputs:
    views = {name: buffer[place].reshape(shape) for name, (place, shape) in places.items()}
    return StepInputs(**views | {name: views[name].view(np.float32) for name in FLOAT_FIELDS})


@lru_cache(maxsize=64)  # more than an engine has shapes; those of engines that were closed go
def _padding(bucket: Bucket, dims: StepDims) -> tuple[np.ndarray, dict[str, tuple[slice, tuple[int, ...]]]]:
    """A buffer of padding alone, for every step of its shape to copy, and where each field is in it."""
    places, start = {}, 0
    for name, shape in input_shapes(bucket, dims).items():
        end = start + math.prod(shape)
        places[name] = slice(start, end), shape
        start = end
    buffer = np.zeros(start, np.int32)
    inputs = _views(buffer, places)
    inputs.kv_write_index[:] = dims.num_pages * dims.page_size
    if inputs.adapter_ids is not None:
        inputs.adapter_ids[:] = -1
    inputs.slot_ids[:] = dims.num_slots
    inputs.stop_ids[:] = -1
    inputs.num_logprobs[:] = -1
    inputs.top_p[:] = 1.0
    buffer.setflags(write=False)
    return buffer, places


def outputs_shape(num_rows: int, dims: StepDims) -> tuple[int, int]:
    """Of a step's packed outputs."""
    return num_rows, 2 + 2 * dims.max_logprobs


def unpack_outputs(packed: np.ndarray, max_logprobs: int) -> StepOutputs:
    """``packed`` [B, 2 + 2 * KL] i32, as the step returns it: token, logprob bits, top ids, top logprob bits."""
    packed = np.ascontiguousarray(packed)
    kl = max_logprobs
    return StepOutputs(
        packed[:, 0], packed[:, 1].view(np.float32), packed[:, 2 : 2 + kl], packed[:, 2 + kl :].view(np.float32)
    )
