"""Log-probabilities in OpenAI's two shapes, that of completions and that of chats; -1 best tokens are all."""

import codecs
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.request import Request
from jaxserve.sampling_params import ALL_LOGPROBS
from jaxserve.text.tokenizer import Tokenizer

# Of one answer, where all tokens' are asked for. They are written as JSON on the event loop, about 3 us a value: so
# many stop every stream for most of a second. gRPC and Python give as many as the engine does.
MAX_ALL_VALUES = 2**18

Entry = tuple[int, float | None, Sequence[tuple[int, float]]]  # token id, its log-probability, the k best


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token's text; ``bytes:\\xe2\\x80`` for part of a character, ``token_id:7`` where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def check_num_values(requests: Sequence[Request], vocab_size: int) -> None:
    """Raises RequestError where all tokens' are asked for of too many positions."""
    num_tokens = {"logprobs": 0, "prompt_logprobs": 0}
    for request in requests:
        prompt_len = len(request.prompt_token_ids)
        if request.params.logprobs == ALL_LOGPROBS:
            num_tokens["logprobs"] += (request.max_total_len - prompt_len) * request.params.n
        if request.params.prompt_logprobs == ALL_LOGPROBS:
            num_tokens["prompt_logprobs"] += prompt_len
    for name, num in num_tokens.items():
        if num * vocab_size > MAX_ALL_VALUES:
            raise RequestError(
                name, f"all {vocab_size} of {num} tokens, at most {MAX_ALL_VALUES} values are given over HTTP"
            )


def _best(top: Sequence[tuple[int, float]], num_top: int) -> Sequence[tuple[int, float]]:
    return top if num_top == ALL_LOGPROBS else top[:num_top]


class CompletionLogprobs:
    """Of one choice, piece by piece: ``text_offset`` counts characters from the beginning of the choice's text."""

    def __init__(self, tokenizer: Tokenizer | None, num_top: int):
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, entries: Sequence[Entry]) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        for token_id, logprob, top in entries:
            text = token_text(self._tokenizer, token_id)
            tokens.append(text)
            values.append(logprob)
            offsets.append(self._offset)
            if self._tokenizer is not None:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            if logprob is None:
                tops.append(None)  # the first token of a prompt: nothing predicts it
                continue
            best: dict[str, float] = {}
            for i, value in _best(top, self._num_top):
                best.setdefault(token_text(self._tokenizer, i), value)  # of tokens with one text the likeliest
            best.setdefault(text, logprob)
            tops.append(best)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(tokenizer: Tokenizer | None, entries: Sequence[Entry], num_top: int) -> list[Any]:
    """Of a prompt's tokens, as vLLM's clients read them: for each but the first, which has None, the ``num_top`` best
    (-1: all) and the token itself by id. ``rank`` is from 1, None where the token is none of the best."""

    def of_token(token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, Any] | None:
        if logprob is None:
            return None
        ranked = {i: (value, rank) for rank, (i, value) in enumerate(_best(top, num_top), 1)}
        return {
            str(i): {"logprob": value, "rank": rank, "decoded_token": token_text(tokenizer, i)}
            for i, (value, rank) in ({token_id: (logprob, None)} | ranked).items()
        }

    return [of_token(*entry) for entry in entries]


def chat_logprobs(tokenizer: Tokenizer | None, entries: Sequence[Entry], num_top: int) -> dict[str, Any]:
    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        data = None if tokenizer is None else tokenizer.token_bytes(token_id)
        text = f"token_id:{token_id}" if data is None else data.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    return {
        "content": [
            one(token_id, logprob) | {"top_logprobs": [one(i, value) for i, value in _best(top, num_top)]}
            for token_id, logprob, top in entries
        ],
        "refusal": None,
    }
