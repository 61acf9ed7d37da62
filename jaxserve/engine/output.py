"""From a request's tokens to what its reader gets: text, stop strings, log-probabilities."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxserve.engine.structured import StructuredOutput
from jaxserve.request import Completion, Embedding, FinishReason, Request, TokenEvent, TokenLogprobs, Usage
from jaxserve.sampling_params import ALL_LOGPROBS
from jaxserve.scheduler.scheduler import CommittedToken
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step_io import StepOutputs
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.stop import StopStrings
from jaxserve.text.tokenizer import Tokenizer

NOTHING: Mapping[int, np.ndarray] = MappingProxyType({})


class Pooled(NamedTuple):
    """What is there of an embedding."""

    total: np.ndarray  # [D] f64, of the final hidden states
    num_tokens: int
    attempt: int


class RequestOutput:
    """One request's output side, from its first token to its last event."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None):
        params = sequence.request.params
        self._request_id = sequence.request.group_id or sequence.request_id
        self._choice = sequence.request.choice
        self.sequence = sequence
        self._params = params
        self._detokenizer = (
            IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                continues_text=not all(map(tokenizer.is_special, sequence.request.prompt_token_ids)),
            )
            if tokenizer
            else None
        )
        grammar = sequence.request.grammar
        self.structured = StructuredOutput(sequence, grammar, tokenizer) if grammar and tokenizer else None
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._pooling = sequence.request.pooling
        self._prompt_logprobs: list[TokenLogprobs | None] = []
        self._num_scored = 1  # prompt tokens whose scores are known or on their way; the first has none
        if sequence.request.scores_prompt:
            self._prompt_logprobs = [None] * sequence.prompt_len
        self._pooled: Pooled | None = None
        asks_little = params.logprobs is None and not self._prompt_logprobs and self._pooling is None
        self._is_plain = tokenizer is None and asks_little  # ids are all there is to tell

    @property
    def num_prompt_logprobs(self) -> int:
        """k, or -1 for all."""
        return self._params.prompt_logprobs or 0

    def unscored(self, start: int, end: int) -> range:
        """Of the positions from ``start`` to ``end`` those of prompt tokens whose scores nobody was asked for yet: a
        preempted sequence computes its prompt again."""
        if not self._prompt_logprobs:  # given, or never asked for
            return range(0)
        first, end = max(start, self._num_scored), min(end, self.sequence.prompt_len)
        self._num_scored = max(self._num_scored, end)
        return range(first, end)

    def forget_scores(self) -> None:
        """The weights have changed: what they have to say of the prompt is wanted anew, if it was not given yet."""
        self._num_scored = 1

    def on_prompt_logprobs(self, position: int, logprobs: TokenLogprobs) -> None:
        """The score of the prompt's token at ``position``; later ones replace earlier ones."""
        self._prompt_logprobs[position] = logprobs

    def on_pooled(self, values: np.ndarray, num_tokens: int, attempt: int) -> None:
        """The sum [D] of the final hidden states of ``num_tokens`` more; those of an earlier ``attempt`` at the prompt
        are dropped."""
        before = self._pooled
        if before is None or before.attempt != attempt:
            before = Pooled(np.zeros(len(values)), 0, attempt)
        self._pooled = Pooled(before.total + values, before.num_tokens + num_tokens, attempt)

    def _embedding_event(self) -> TokenEvent:
        assert self._pooled is not None
        values = self._pooled.total / self._pooled.num_tokens
        if self.sequence.request.normalize:
            values = values / max(float(np.linalg.norm(values)), 1e-12)
        usage = self.usage()
        return TokenEvent(
            request_id=self._request_id,
            index=0,
            token_id=None,
            finish_reason="stop",
            usage=replace(usage, completion_tokens=0),
            embedding=values.astype(np.float32),
        )

    def on_token(
        self, token: CommittedToken, outputs: StepOutputs, in_full: Mapping[int, np.ndarray] = NOTHING
    ) -> TokenEvent:
        """The event of a committed token; it may end the request by a stop string before the scheduler would.

        ``in_full``: all log-probabilities [V] of the rows that want them.
        """
        if self._pooling is not None:
            return self._embedding_event()
        reason, stop_reason = token.finish_reason, token.stop_reason
        if self._is_plain:
            usage = self.usage() if reason else None
            return TokenEvent(  # by position, which takes half the time
                self._request_id, token.index, token.token, "", None, None, reason, stop_reason, usage, self._choice
            )
        # A token that ends the request is part of its ids, and of its text only on demand.
        silent = reason == "stop" and not self._params.include_stop_str_in_output
        if self.structured and reason != "stop" and self.structured.consume(token.token):
            reason = "stop"
        text = self._detokenizer.add(token.token) if self._detokenizer and not silent else ""
        if reason and self._detokenizer:
            text += self._detokenizer.flush()
        if token.index >= self._params.min_tokens:
            text, matched = self._stops.add(text)
            if matched is not None:
                reason, stop_reason = "stop", matched
            elif reason:
                text += self._stops.flush()
        logprob = top = prompt_logprobs = None
        if (k := self._params.logprobs) == ALL_LOGPROBS:
            values = in_full[token.row]
            logprob, top = float(values[token.token]), all_in_order(values)
        elif k is not None:
            logprob = float(outputs.logprobs[token.row])
            ids, values = outputs.top_ids[token.row, :k], outputs.top_logprobs[token.row, :k]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        if self._prompt_logprobs and token.index == 0:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        usage = self.usage() if reason else None
        return TokenEvent(
            *(self._request_id, token.index, token.token, text, logprob, top, reason, stop_reason, usage),
            *(self._choice, prompt_logprobs),
        )

    def on_end(self, reason: FinishReason, stop_reason: str | None = None) -> TokenEvent:
        """The event that ends the request without a token; text that was held back comes with it."""
        text = self._stops.add(self._detokenizer.flush())[0] + self._stops.flush() if self._detokenizer else ""
        return TokenEvent(
            request_id=self._request_id,
            index=self.sequence.num_output_tokens,
            token_id=None,
            text=text,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=self.usage(),
            choice=self._choice,
        )

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.sequence.prompt_len,
            completion_tokens=self.sequence.num_output_tokens,
            cached_tokens=self.sequence.num_cached,
            admitted_at=self.sequence.admitted_at,
        )


def all_in_order(logprobs: np.ndarray) -> tuple[tuple[int, float], ...]:
    """(token id, log-probability) of the whole vocabulary, descending, of [V] f32."""
    order = np.argsort(-logprobs, kind="stable")
    return tuple(zip(order.tolist(), logprobs[order].tolist()))


def completions_of(request: Request, events: list[TokenEvent]) -> list[Completion]:
    """The request's choices in order, from all its events."""
    return [_completion(request, [e for e in events if e.choice == k]) for k in range(request.params.n)]


def _completion(request: Request, events: list[TokenEvent]) -> Completion:
    last = events[-1]
    assert last.finish_reason is not None and last.usage is not None
    tokens = [e for e in events if e.token_id is not None]
    logprobs = None
    if request.params.logprobs is not None:
        logprobs = [TokenLogprobs(token_id=e.token_id, logprob=e.logprob, top=e.top_logprobs or ()) for e in tokens]  # pyright: ignore[reportArgumentType]
    return Completion(
        request_id=request.request_id,
        text="".join(e.text for e in events),
        token_ids=[e.token_id for e in tokens if e.token_id is not None],
        finish_reason=last.finish_reason,
        prompt_len=len(request.prompt_token_ids),
        stop_reason=last.stop_reason,
        logprobs=logprobs,
        cached_tokens=last.usage.cached_tokens,
        choice=last.choice,
        prompt_logprobs=next((list(e.prompt_logprobs) for e in events if e.prompt_logprobs), None),
    )


def embedding_of(request: Request, last: TokenEvent) -> Embedding:
    """Of a request for one, from its only event."""
    return Embedding(request_id=request.request_id, values=last.embedding, prompt_len=len(request.prompt_token_ids))
