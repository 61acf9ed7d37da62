"""What a request forbids, favours or penalises, on its way to the device: once, when its sequence gets a slot.

The device keeps it for each slot, with the tokens of the sequence so far, and adds what it samples by itself. So a step
carries no byte of it; the counts are exact though the last token is not read yet when the next step is built, and a
sequence whose prompt was found in the prefix cache, or that returns after a preemption, brings all its tokens again.

All of a slot lies in ONE int32 buffer (floats bit-cast); ``SlotConstraints`` are numpy views into it.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxserve.request import Request
from jaxserve.step_io import StepDims

Array = Any  # numpy on the host, jax on the device

MAX_BIASES = 512  # NB: token ids with a bias, of one request
MAX_BAD_SEQUENCES = 128  # NW: bad words of more than one token, each with and without a space; others have no limit
MAX_BAD_LEN = 16  # KW: tokens of a bad word

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)


class ConstraintDims(NamedTuple):
    """Sizes that the slots of one engine share."""

    num_slots: int  # R
    vocab_size: int  # V
    max_len: int  # TL: tokens of a sequence, at most

    @classmethod
    def of(cls, dims: StepDims, vocab_size: int) -> "ConstraintDims":
        return cls(dims.num_slots, vocab_size, dims.max_pages_per_seq * dims.page_size)

    @property
    def num_words(self) -> int:
        """W: int32 words that hold a bit for each token id."""
        return -(-self.vocab_size // 32)


class SlotConstraints(NamedTuple):
    """Views into one slot's buffer."""

    slot: Array  # [1] i32; R: goes nowhere
    num_tokens: Array  # [2] i32: tokens of the prompt, tokens of the sequence
    penalties: Array  # [3] f32: repetition, frequency, presence
    bias_ids: Array  # [NB] i32, padding V
    biases: Array  # [NB] f32
    banned: Array  # [W] i32, bit i % 32 of word i // 32: token i cannot be sampled
    bad_sequences: Array  # [NW, KW] i32, right-aligned, padding -1: the last cannot be sampled after the others
    token_ids: Array  # [TL] i32, of the sequence: prompt, then output; padding 0


FLOAT_FIELDS = ("penalties", "biases")


def slot_shapes(dims: ConstraintDims) -> dict[str, tuple[int, ...]]:
    """Shape of every field of ``SlotConstraints``, in buffer order."""
    shapes = ((1,), (2,), (3,), (MAX_BIASES,), (MAX_BIASES,), (dims.num_words,), (MAX_BAD_SEQUENCES, MAX_BAD_LEN))
    return dict(zip(SlotConstraints._fields, (*shapes, (dims.max_len,)), strict=True))


def slot_buffer_size(dims: ConstraintDims) -> int:
    """Elements of the int32 buffer that holds a slot's constraints."""
    return sum(math.prod(shape) for shape in slot_shapes(dims).values())


def new_slot(dims: ConstraintDims) -> tuple[np.ndarray, SlotConstraints]:
    """A buffer for no slot and without a constraint, and the views into it."""
    buffer = np.zeros(slot_buffer_size(dims), np.int32)
    views, start = {}, 0
    for name, shape in slot_shapes(dims).items():
        size = math.prod(shape)
        view = buffer[start : start + size].reshape(shape)
        views[name] = view.view(np.float32) if name in FLOAT_FIELDS else view
        start += size
    slot = SlotConstraints(**views)
    slot.slot[:] = dims.num_slots
    slot.penalties[0] = 1
    slot.bias_ids[:] = dims.vocab_size
    slot.bad_sequences[:] = -1
    return buffer, slot


def banned_words(request: Request, num_words: int) -> np.ndarray:
    """[W] i32: bits of the tokens that the request can never sample (``SlotConstraints.banned``)."""
    banned = np.zeros(32 * num_words, bool)
    if request.params.allowed_token_ids is not None:
        banned[:] = True
        banned[list(request.params.allowed_token_ids)] = False
    banned[[s[0] for s in request.bad_sequences if len(s) == 1]] = True
    return np.packbits(banned, bitorder="little").view("<i4")


def set_bits(words: np.ndarray, ids: Iterable[int], value: bool) -> None:
    """Sets or clears the bits of ``ids`` in ``words`` [W] i32."""
    bits = words.view(np.uint32)
    for i in ids:
        bit = np.uint32(1 << (i & 31))
        bits[i >> 5] = bits[i >> 5] | bit if value else bits[i >> 5] & ~bit


def pack_slot(slot: int, request: Request, tokens: list[int], dims: ConstraintDims) -> np.ndarray:
    """The buffer of ``request``'s constraints for ``slot``; ``tokens``: its prompt and all its output so far."""
    buffer, packed = new_slot(dims)
    params = request.params
    packed.slot[:] = slot
    packed.num_tokens[:] = len(request.prompt_token_ids), len(tokens)
    # A float64 that rounds to inf or to 0 would turn logits into NaN.
    packed.penalties[0] = min(max(params.repetition_penalty, FLOAT32_TINY), FLOAT32_MAX)
    packed.penalties[1:] = params.frequency_penalty, params.presence_penalty
    if params.logit_bias:
        packed.bias_ids[: len(params.logit_bias)] = list(params.logit_bias)
        packed.biases[: len(params.logit_bias)] = list(params.logit_bias.values())
    packed.banned[:] = banned_words(request, dims.num_words)
    for row, sequence in zip(packed.bad_sequences, (s for s in request.bad_sequences if len(s) > 1)):
        row[-len(sequence) :] = sequence
    packed.token_ids[: len(tokens)] = tokens
    return buffer
