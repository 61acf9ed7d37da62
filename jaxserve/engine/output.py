"""From a request's tokens to what its reader gets: text, stop strings, log-probabilities."""

from jaxserve.request import Completion, FinishReason, Request, TokenEvent, TokenLogprobs, Usage
from jaxserve.scheduler.scheduler import CommittedToken
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step_io import StepOutputs
from jaxserve.text.detokenizer import IncrementalDetokenizer
from jaxserve.text.stop import StopStrings
from jaxserve.text.tokenizer import Tokenizer


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
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._is_plain = tokenizer is None and params.logprobs is None  # ids are all there is to tell

    def on_token(self, token: CommittedToken, outputs: StepOutputs) -> TokenEvent:
        """The event of a committed token; it may end the request by a stop string before the scheduler would."""
        reason, stop_reason = token.finish_reason, token.stop_reason
        if self._is_plain:
            return TokenEvent(
                request_id=self._request_id,
                index=token.index,
                token_id=token.token,
                finish_reason=reason,
                stop_reason=stop_reason,
                usage=self.usage() if reason else None,
                choice=self._choice,
            )
        # A token that ends the request is part of its ids, and of its text only on demand.
        silent = reason == "stop" and not self._params.include_stop_str_in_output
        text = self._detokenizer.add(token.token) if self._detokenizer and not silent else ""
        if reason and self._detokenizer:
            text += self._detokenizer.flush()
        if token.index >= self._params.min_tokens:
            text, matched = self._stops.add(text)
            if matched is not None:
                reason, stop_reason = "stop", matched
            elif reason:
                text += self._stops.flush()
        logprob = top = None
        if self._params.logprobs is not None:
            logprob = float(outputs.logprobs[token.row])
            k = self._params.logprobs
            ids, values = outputs.top_ids[token.row, :k], outputs.top_logprobs[token.row, :k]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenEvent(
            request_id=self._request_id,
            index=token.index,
            token_id=token.token,
            text=text,
            logprob=logprob,
            top_logprobs=top,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=self.usage() if reason else None,
            choice=self._choice,
        )

    def on_end(self, reason: FinishReason) -> TokenEvent:
        """The event that ends the request without a token; text that was held back comes with it."""
        text = self._stops.add(self._detokenizer.flush())[0] + self._stops.flush() if self._detokenizer else ""
        return TokenEvent(
            request_id=self._request_id,
            index=self.sequence.num_output_tokens,
            token_id=None,
            text=text,
            finish_reason=reason,
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
    )
