"""What a sequence with structured output may sample next: its grammar, and all else that forbids tokens.

Computed on the host from all the sequence's tokens, while the device is in the forward pass whose sampler needs it.
"""

import numpy as np

from jaxserve.constraint_io import banned_words, set_bits
from jaxserve.request import FinishReason
from jaxserve.scheduler.sequence import Sequence
from jaxserve.text.grammar import Grammar, Matcher
from jaxserve.text.tokenizer import Tokenizer

DEAD_END = "structured_outputs and other fields together let no token follow"


class StructuredOutput:
    """One sequence's place in its grammar. Survives preemptions: the text does."""

    def __init__(self, sequence: Sequence, grammar: Grammar, tokenizer: Tokenizer):
        request = sequence.request
        self.matcher: Matcher = grammar.matcher()
        self.request_id = sequence.request_id
        self._sequence = sequence
        self._all_ends = grammar.end_ids
        # An id with a text ends the request where the grammar lets the text follow, as any other token.
        self._ends = [i for i in request.stop_token_ids if i in self._all_ends or tokenizer.is_special(i)]
        self._suppressed = list(request.stop_token_ids)  # before min_tokens
        self._min_tokens = request.params.min_tokens
        self._bad_sequences = [s for s in request.bad_sequences if len(s) > 1]
        forbids = request.params.allowed_token_ids is not None or bool(request.bad_sequences)
        self._not_banned = ~banned_words(request, grammar.num_words) if forbids else None  # [W]

    def consume(self, token: int) -> bool:
        """Goes on by a sampled token that did not end the request. True: the text is complete."""
        self.matcher.consume(token)
        return self.matcher.is_complete

    def restrict(self, allowed: np.ndarray) -> tuple[FinishReason, str | None] | None:
        """Takes from ``allowed`` [W] i32, filled by the matcher, what may not be sampled now, and adds the ends.

        Returns why the sequence has to end instead, if nothing is left: finish and stop reason.
        """
        if (error := self.matcher.error) is not None:
            return "abort", f"structured_outputs: {error}"
        is_accepting = self.matcher.is_accepting
        set_bits(allowed, self._all_ends, False)
        if self._not_banned is not None:
            allowed &= self._not_banned
        if is_accepting:
            set_bits(allowed, self._ends, True)
        output = self._sequence.tokens[self._sequence.prompt_len :]
        if len(output) < self._min_tokens:
            set_bits(allowed, self._suppressed, False)
        for *before, last in self._bad_sequences:
            if output[len(output) - len(before) :] == before:
                set_bits(allowed, (last,), False)
        if allowed.any():
            return None
        return ("stop", None) if is_accepting else ("abort", DEAD_END)
