"""The engine's door: a prompt and its parameters become a ``Request``, or a ``RequestError`` that names the field."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np

from jaxserve.config import ModelConfig
from jaxserve.engine.constraints import CONSTRAINTS, bad_sequences, check_constraints
from jaxserve.errors import RequestError
from jaxserve.request import LoadedAdapter, Pooling, Request
from jaxserve.sampling_params import ALL_LOGPROBS, MAX_ALL_LOGPROBS, SamplingParams, StructuredOutputs
from jaxserve.step_io import SAMPLINGS, Sampling
from jaxserve.text.chat_template import ChatTemplateError
from jaxserve.text.grammar import Grammar, GrammarCompiler
from jaxserve.text.tokenizer import Tokenizer, TokenizerError

Prompt = str | Sequence[int]  # a row of an array will do, numpy's or jax's
Conversation = Sequence[Mapping[str, Any]]  # messages as OpenAI's API has them: {"role": ..., "content": ...}


class Door:
    """What one engine takes. Immutable: any thread may use it.

    Args:
        max_model_len: tokens of prompt and output together.
        tokenizer: None where prompts are token ids only.
        check: the scheduler's limits on a whole request; raises RequestError.
        samplings: what the engine compiled samplers for.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        max_model_len: int,
        tokenizer: Tokenizer | None,
        check: Callable[[Request], None],
        samplings: Sequence[Sampling] = SAMPLINGS,
    ):
        self._vocab_size = model_config.vocab_size
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._check = check
        if not samplings or set(samplings) - set(SAMPLINGS):
            raise ValueError(f"samplings={tuple(samplings)} must be some of {', '.join(SAMPLINGS)}")
        self._best_sampling = max(map(SAMPLINGS.index, samplings))
        ends = (*model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ()))
        self._eos_token_ids = tuple(dict.fromkeys(ends))
        self._grammars = tokenizer and GrammarCompiler(tokenizer, self._vocab_size, self._eos_token_ids)

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None,
        priority: int,
        deadline: float | None,
        adapter: LoadedAdapter | None = None,
    ) -> Request:
        """See ``Engine.make_request``."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params: {params!r:.80} is not SamplingParams")
        limit = self._max_model_len
        self._check_sampling(params)
        ids = self._prompt_ids(prompt, params.truncate_prompt_tokens)
        room = limit - len(ids)
        if room < 1:
            raise RequestError("prompt", f"{len(ids)} tokens leave no room for output in max_model_len={limit}")
        for name in ("max_tokens", "min_tokens"):
            if (asked := getattr(params, name)) is not None and asked > room:
                raise RequestError(name, f"{asked} and {len(ids)} prompt tokens are more than max_model_len={limit}")
        if params.stop and self._tokenizer is None:
            raise RequestError("stop", "this engine has no tokenizer; use stop_token_ids")
        for i in params.stop_token_ids:
            if i >= self._vocab_size:
                raise RequestError("stop_token_ids", f"{i} is not below the vocabulary's {self._vocab_size}")
        stop_ids = (*(() if params.ignore_eos else self._eos_token_ids), *params.stop_token_ids)
        sequences = bad_sequences(params.bad_words, self._tokenizer, self._vocab_size)
        check_constraints(params, sequences, stop_ids, self._vocab_size)
        request = Request(
            request_id=secrets.token_hex(8) if request_id is None else request_id,
            prompt_token_ids=ids,
            params=params,
            max_total_len=len(ids) + (room if params.max_tokens is None else params.max_tokens),
            stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            priority=priority,
            deadline=deadline,
            arrival=time.monotonic(),
            bad_sequences=sequences,
            grammar=self._grammar(params.structured_outputs),
            adapter=adapter,
        )
        self._check(request)
        self._check_logprobs(request)
        return request

    def make_embedding_request(
        self,
        prompt: Prompt,
        *,
        pooling: Pooling,
        normalize: bool,
        truncate_prompt_tokens: int | None,
        request_id: str | None,
        priority: int,
        deadline: float | None,
        adapter: LoadedAdapter | None = None,
    ) -> Request:
        """See ``Engine.make_embedding_request``."""
        if pooling not in get_args(Pooling):
            raise RequestError("pooling", f"{pooling!r} is not one of {', '.join(get_args(Pooling))}")
        if SAMPLINGS.index("any") > self._best_sampling:
            raise RequestError(
                "pooling", f"{pooling} needs sampling 'any', this engine has {SAMPLINGS[self._best_sampling]!r}"
            )
        params = SamplingParams(
            temperature=0, max_tokens=1, ignore_eos=True, truncate_prompt_tokens=truncate_prompt_tokens
        )
        request = self.make_request(
            prompt, params, request_id=request_id, priority=priority, deadline=deadline, adapter=adapter
        )
        return replace(request, pooling=pooling, normalize=normalize)

    def _check_logprobs(self, request: Request) -> None:
        """Everything about every token is more than a machine may hold."""
        params = request.params
        num_tokens = {
            "logprobs": (request.max_total_len - len(request.prompt_token_ids)) * params.n,
            "prompt_logprobs": len(request.prompt_token_ids),
        }
        for name, num in num_tokens.items():
            if getattr(params, name) == ALL_LOGPROBS and num * self._vocab_size > MAX_ALL_LOGPROBS:
                raise RequestError(
                    name, f"all {self._vocab_size} of {num} tokens, at most {MAX_ALL_LOGPROBS} values are given"
                )

    def _grammar(self, asked: StructuredOutputs | None) -> Grammar | None:
        if asked is None:
            return None
        if self._grammars is None:
            raise RequestError("structured_outputs", "this engine has no tokenizer")
        return self._grammars.compile(asked)

    def _check_sampling(self, params: SamplingParams) -> None:
        asks = {
            **{name: "constrained" for name, neutral in CONSTRAINTS.items() if getattr(params, name) not in neutral},
            "logprobs": "any" if params.logprobs else "greedy",
            "prompt_logprobs": "any" if params.prompt_logprobs is not None else "greedy",
            "min_tokens": "any" if params.min_tokens else "greedy",
            "top_k": "any" if params.top_k > 0 and params.temperature > 0 else "greedy",
            "top_p": "any" if params.top_p < 1 and params.temperature > 0 else "greedy",
            "temperature": "random" if params.temperature > 0 else "greedy",
        }
        for name, sampling in asks.items():
            if SAMPLINGS.index(sampling) > self._best_sampling:
                best = SAMPLINGS[self._best_sampling]
                raise RequestError(
                    name, f"{getattr(params, name)} needs sampling {sampling!r}, this engine has {best!r}"
                )

    def _prompt_ids(self, prompt: Prompt, at_most: int | None) -> tuple[int, ...]:
        """``prompt``'s token ids, the last ``at_most``."""
        if isinstance(prompt, str):
            ids = self._encode(prompt, cut=at_most is not None)
            # A tokenizer may have more tokens than the embedding has rows (Gemma 3; a padding token added later).
            if ids and max(ids) >= self._vocab_size:
                raise RequestError(
                    "prompt", f"its token {max(ids)} is not below the model's vocabulary {self._vocab_size}"
                )
        else:
            ids = _sequence(prompt)
            # Of thousands of ids one after another is asked only where something is wrong, or numpy's.
            if not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < self._vocab_size):
                for i, token in enumerate(ids):
                    integer = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
                    if not integer or not 0 <= token < self._vocab_size:
                        raise RequestError("prompt", f"token {i} is {token!r}, not an id below {self._vocab_size}")
                ids = tuple(map(int, ids))
        if not ids:
            raise RequestError("prompt", "is empty")
        return ids if at_most is None else ids[-at_most:]

    def _encode(self, prompt: str, *, cut: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise RequestError("prompt", "this engine has no tokenizer; give token ids")
        limit = self._max_model_len
        try:
            # Refused before it is tokenized: 10 MB of text take seconds, their least number of tokens does not.
            if not cut and (least := self._tokenizer.min_num_tokens(prompt)) > limit:
                raise RequestError("prompt", f"at least {least} tokens do not fit in max_model_len={limit}")
            return tuple(self._tokenizer.encode(prompt))
        except UnicodeEncodeError as error:
            raise RequestError("prompt", f"not valid Unicode at character {error.start}") from None
        except TokenizerError as error:
            raise RequestError("prompt", str(error)) from None


# Iterable, and no prompts: bytes are numbers, but hardly token ids.
_NEITHER = (bytes, bytearray, Mapping, Set)


def _sequence(prompt: Any) -> tuple[Any, ...]:
    """What is to be token ids, as a tuple: of a sequence, or of an array (numpy's, jax's) of one dimension."""
    if isinstance(prompt, (list, tuple)):
        return tuple(prompt)
    if hasattr(prompt, "__array__"):
        array = np.asarray(prompt)
        if array.ndim != 1:
            raise RequestError("prompt", f"an array of shape {array.shape}, token ids have one dimension")
        return tuple(array.tolist())
    if isinstance(prompt, _NEITHER) or not isinstance(prompt, Iterable):
        raise RequestError("prompt", f"{prompt!r:.80} is neither text nor token ids")
    return tuple(prompt)


def listed_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list; of an array each row is a prompt. What is no prompt is a list of itself, for
    the door to refuse."""
    if hasattr(prompts, "__array__"):
        array = np.asarray(cast(Any, prompts))
        return list(array) if array.ndim > 1 else [cast(Prompt, array)]
    if isinstance(prompts, (str, *_NEITHER)) or not isinstance(prompts, Iterable):
        return [cast(Prompt, prompts)]
    listed = list(prompts)
    if listed and isinstance(listed[0], (int, np.integer)):
        return [cast(Prompt, listed)]
    return cast(list[Prompt], listed)


def encode_conversations(
    tokenizer: Tokenizer | None, messages: Conversation | Iterable[Conversation], template: Mapping[str, Any]
) -> list[list[int]]:
    """Token ids of one conversation or of several.

    Args:
        template: what else ``Tokenizer.encode_chat`` takes.

    Raises RequestError naming ``messages``.
    """
    if tokenizer is None:
        raise RequestError("messages", "this engine has no tokenizer, so no chat template")
    if isinstance(messages, (str, *_NEITHER)) or not isinstance(messages, Iterable):
        raise RequestError("messages", f"{messages!r:.80} is not a list of messages")
    listed = list(messages)
    conversations = [listed] if listed and isinstance(listed[0], Mapping) else listed
    try:
        return [tokenizer.encode_chat(cast(Conversation, one), **template) for one in conversations]
    except (ChatTemplateError, TokenizerError) as error:
        raise RequestError("messages", str(error)) from error
