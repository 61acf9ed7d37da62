"""What the door asks of penalties, biases and forbidden tokens: known limits, and always a token left to sample."""

from typing import Any

from jaxserve.constraint_io import MAX_BAD_LEN, MAX_BAD_SEQUENCES, MAX_BIASES
from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

CONSTRAINTS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": ((),),
    "structured_outputs": (None,),
}  # sampling field that needs sampling "constrained" -> the values that ask for nothing


def bad_sequences(words: tuple[str, ...], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token sequences of ``bad_words``: each word with and without a space before it.

    One that ends with another is left out, for it is forbidden with it; so is one with an id that the model lacks.

    Raises:
        RequestError: no tokenizer, or a word that it cannot read, or more or longer ones than a slot holds.
    """
    if words and tokenizer is None:
        raise RequestError("bad_words", "this engine has no tokenizer")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        assert tokenizer is not None
        for text in (word.lstrip(), " " + word.lstrip()):
            try:
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            except (TokenizerError, UnicodeEncodeError) as error:
                raise RequestError("bad_words", f"{word!r}: {error}") from None
            if not ids:
                raise RequestError("bad_words", f"{word!r} has no tokens")
            if max(ids) < vocab_size:
                found[ids] = None
    sequences = tuple(s for s in found if not any(s[i:] in found for i in range(1, len(s))))
    for sequence in sequences:
        if len(sequence) > MAX_BAD_LEN:
            raise RequestError("bad_words", f"a word of {len(sequence)} tokens, at most {MAX_BAD_LEN} are taken")
    if (num := sum(len(s) > 1 for s in sequences)) > MAX_BAD_SEQUENCES:
        raise RequestError(
            "bad_words",
            f"{num} sequences of more than one token (a word is up to two, with and without a space), at most "
            f"{MAX_BAD_SEQUENCES} are taken",
        )
    return sequences


def check_constraints(
    params: SamplingParams, sequences: tuple[tuple[int, ...], ...], stop_ids: tuple[int, ...], vocab_size: int
) -> None:
    """RequestError for an id beyond the vocabulary, for too many, or if a step could be left with no token to sample.

    ``sequences`` are of ``bad_sequences``; ``stop_ids`` end the request, and cannot be sampled before ``min_tokens``.
    """
    biased = params.logit_bias or {}
    for name, ids in (("logit_bias", biased), ("allowed_token_ids", params.allowed_token_ids or ())):
        if (largest := max(ids, default=0)) >= vocab_size:
            raise RequestError(name, f"{largest} is not below the vocabulary's {vocab_size}")
    if len(biased) > MAX_BIASES:
        raise RequestError("logit_bias", f"{len(biased)} token ids, at most {MAX_BIASES} are taken")
    # Of a bad word of several tokens the last may be forbidden at any time: one token must be free of all of them.
    forbidden = {"bad_words": {s[-1] for s in sequences}, "min_tokens": set(stop_ids if params.min_tokens else ())}
    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
    num_allowed = vocab_size if allowed is None else len(allowed)
    taken: set[int] = set()
    for name, ids in forbidden.items():
        # Not by a set of the whole vocabulary, which takes milliseconds to make.
        taken |= {i for i in ids if i < vocab_size} if allowed is None else allowed & ids
        if ids and len(taken) >= num_allowed:
            raise RequestError(
                name, f"forbids {len(ids)} tokens and may leave 0 of the {num_allowed} that are allowed to sample from"
            )
