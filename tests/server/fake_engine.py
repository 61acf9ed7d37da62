"""An engine whose every answer is known by arithmetic: what the asyncio and gRPC layers are tested on.

Token number ``i`` (from 0) of a prompt is a lower-case letter, ``expected_tokens``. Token ids are bytes, so a stream's
text is known, too. Choice ``k`` of a request starts with token number ``k``. One step gives one token to every live
request or choice. It holds one "page" a live one.
"""

import itertools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.config import CacheConfig, LoraConfig, ModelConfig, ParallelConfig, SchedulerConfig
from jaxserve.errors import QueueFullError, RequestError, UnknownLoraError
from jaxserve.request import (
    EngineStats,
    FinishReason,
    HeldPages,
    LoadedAdapter,
    LoraLoad,
    PageMap,
    Pooling,
    Request,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.decoding import BYTE_OF_CHAR
from jaxserve.text.tokenizer import Tokenizer

EOS_ID = 256
QUEUE_TIME_S = -5.0  # what every request is said to have waited: nothing real is mistaken for it
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}"
)


def expected_tokens(prompt: str | Sequence[int], num_tokens: int) -> list[int]:
    """The first ``num_tokens`` output tokens of ``prompt``."""
    ids = prompt.encode() if isinstance(prompt, str) else prompt
    return [_token(ids, i) for i in range(num_tokens)]


def _token(prompt_ids: Sequence[int], index: int) -> int:
    return ord("a") + (sum(prompt_ids) + 7 * index) % 26


def _name(request: Request) -> str:
    return request.group_id or request.request_id


def expected_text(prompt: str | Sequence[int], num_tokens: int) -> str:
    return bytes(expected_tokens(prompt, num_tokens)).decode()


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Token ids 0..255 are the bytes, 256 is end-of-sequence."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF_CHAR), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer.from_backend(backend, eos_token_ids=[EOS_ID], chat_template=chat_template)


class FakeEngine:
    """See the module. Its knobs may be turned from any thread.

    Args:
        step_delay_s: how long a step takes.
        text_scale: each token's text is its letter so many times.
        says: the answer to everything instead, in ASCII: a token a character, then end-of-sequence.
    Attributes:
        fail: once set, the next step raises.
        may_step: while clear, a step hangs.
        idle: set while no request is live.
        requests: every request taken, in order.
    """

    def __init__(
        self,
        *,
        max_model_len: int = 400,
        max_num_waiting: int = 1024,
        tokenizer: Tokenizer | None = None,
        step_delay_s: float = 0.0,
        text_scale: int = 1,
        says: str | None = None,
    ):
        self.model_name = "fake"
        self.sampling_defaults: dict[str, Any] = {}
        self.model_config = ModelConfig(
            vocab_size=257, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
            eos_token_ids=(EOS_ID,),
        )  # fmt: skip
        self.cache_config = CacheConfig(num_pages=100, page_size=16)
        self.scheduler_config = SchedulerConfig(
            max_model_len=max_model_len, max_num_seqs=8, prefill_sizes=(64,), decode_sizes=(8,),
            max_num_waiting=max_num_waiting,
        )  # fmt: skip
        self.parallel_config = ParallelConfig()
        self.lora_config = LoraConfig(max_loras=2, max_rank=8)
        self.dtype = "float32"
        self.tokenizer = tokenizer
        self.fail = threading.Event()
        self.may_step = threading.Event()
        self.may_step.set()
        self.hangs = threading.Event()
        self.idle = threading.Event()
        self.idle.set()
        self.requests: list[Request] = []
        self.num_steps = 0
        self.closed = False
        self.params: object = None
        self.loras: dict[str, LoadedAdapter] = {}
        self._step_delay_s = step_delay_s
        self._text_scale = text_scale
        self._says = says
        self._live: dict[str, tuple[Request, int]] = {}  # request and its number of output tokens
        self._last_events: list[TokenEvent] = []
        self._num_tokens = 0
        self._names = itertools.count()
        self._thread: int | None = None

    def make_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request:
        limit = self.scheduler_config.max_model_len
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            if (least := self.tokenizer.min_num_tokens(prompt)) > limit:
                raise RequestError("prompt", f"at least {least} tokens, max_model_len={limit}")
            prompt = self.tokenizer.encode(prompt)
        if not prompt:
            raise RequestError("prompt", "is empty")
        if lora is not None and lora not in self.loras:
            raise UnknownLoraError("lora", f"{lora!r} is not loaded")
        if len(prompt) >= limit:
            raise RequestError("prompt", f"{len(prompt)} tokens, max_model_len={limit}")
        return Request(
            request_id=request_id or f"fake-{next(self._names)}",
            prompt_token_ids=tuple(prompt),
            params=params,
            max_total_len=min(limit, len(prompt) + (params.max_tokens or limit)),
            stop_token_ids=params.stop_token_ids,
            seed=params.seed or 0,
            priority=priority,
            deadline=deadline,
            arrival=time.monotonic(),
            adapter=None if lora is None else self.loras[lora],
        )

    def make_embedding_request(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request:
        params = SamplingParams(max_tokens=1, truncate_prompt_tokens=truncate_prompt_tokens)
        request = self.make_request(
            prompt, params, request_id=request_id, priority=priority, deadline=deadline, lora=lora
        )
        return replace(request, pooling=pooling, normalize=normalize)

    def add_request(self, request: Request) -> None:
        self._on_one_thread()
        if len(self._live) >= self.scheduler_config.max_num_waiting:
            raise QueueFullError(f"the queue is full: {len(self._live)} requests")
        self._live |= {choice.request_id: (choice, 0) for choice in request.choices()}
        self.requests.append(request)
        self.idle.clear()

    def abort(self, request_id: str) -> bool:
        self._on_one_thread()
        own_ids = [own_id for own_id, (request, _) in self._live.items() if _name(request) == request_id]
        for own_id in own_ids:
            self._end(own_id, "abort")
        return bool(own_ids)

    def step(self) -> list[TokenEvent]:
        self._on_one_thread()
        time.sleep(self._step_delay_s)  # what a step takes, not a synchronisation
        if not self.may_step.wait(0):
            self.hangs.set()
            self.may_step.wait()
        if self.fail.is_set():
            raise RuntimeError("the device was lost")
        self.num_steps += 1
        for own_id, (request, _) in list(self._live.items()):
            if request.deadline is not None and time.monotonic() >= request.deadline:
                self._end(own_id, "deadline")
        events, self._last_events = self._last_events, []
        events += [self._next_event(request, index) for request, index in list(self._live.values())]
        self._set_idle()
        return events

    def load_params(self, name_or_path: str | Path) -> str:
        if not Path(name_or_path).is_file():
            raise ValueError(f"{name_or_path}: no checkpoint is there")
        return Path(name_or_path).read_text()

    def update_params(self, params: object) -> None:
        self._on_one_thread()
        self.params = params

    def read_lora(self, path: str | Path) -> str:
        """Of a file, whose text is the rank."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: no adapter is there")
        return str(path)

    def add_lora(self, name: str, adapter: str) -> LoadedAdapter:
        self._on_one_thread()
        if name in self.loras:
            raise RequestError("lora_name", f"{name!r} is loaded already")
        rank = int(Path(adapter).read_text())
        loaded = LoadedAdapter(name=name, slot=len(self.loras), generation=1, rank=rank, path=adapter)
        self.loras = self.loras | {name: loaded}
        return loaded

    def unload_lora(self, name: str) -> None:
        self._on_one_thread()
        if name not in self.loras:
            raise UnknownLoraError("lora_name", f"{name!r} is not loaded")
        self.loras = {n: adapter for n, adapter in self.loras.items() if n != name}

    def list_loras(self) -> tuple[LoadedAdapter, ...]:
        return tuple(self.loras.values())

    def has_unfinished(self) -> bool:
        return bool(self._live)

    def stats(self) -> EngineStats:
        self._on_one_thread()
        return EngineStats(
            num_running=len(self._live), num_waiting=0, num_active_rows=len(self._live), num_pages=100,
            num_pages_held=len(self._live), num_tokens_held=8 * len(self._live), num_tokens_reserved=0,
            num_pages_cached=3, kv_cache_usage=len(self._live) / 100, kv_fragmentation=0.5,
            prefix_cache_queries=40, prefix_cache_hits=30, num_preemptions=2,
            num_steps=self.num_steps, prompt_tokens=sum(len(r.prompt_token_ids) for r in self.requests),
            generation_tokens=self._num_tokens, recompilations_after_ready=0,
            loras=tuple(LoraLoad(name=name, num_running=self._num_using(name), num_waiting=0) for name in self.loras),
            step_tokens=self._num_tokens, steps_by_size=(0, self.num_steps, *(0 for _ in range(14))),
        )  # fmt: skip

    def _num_using(self, lora: str) -> int:
        return sum(request.adapter is not None and request.adapter.name == lora for request, _ in self._live.values())

    def page_map(self) -> PageMap:
        """Every live request holds page 0, and one of its own."""
        self._on_one_thread()
        held = enumerate(self._live.values(), 1)
        return PageMap(
            num_pages=100,
            page_size=16,
            cached=(97, 98, 99),
            sequences=tuple(
                HeldPages(
                    request_id=_name(request), choice=request.choice, is_running=True, num_preemptions=0, pages=(0, i),
                    num_tokens=len(request.prompt_token_ids) + num_tokens, num_output_tokens=num_tokens,
                )
                for i, (request, num_tokens) in held
            ),
        )  # fmt: skip

    def close(self) -> None:
        self._on_one_thread()
        self.closed = True

    def _next_event(self, request: Request, index: int) -> TokenEvent:
        token = _token(request.prompt_token_ids, index + request.choice)
        if self._says is not None:
            token = [*self._says.encode("ascii"), EOS_ID][index]
        num_tokens = index + 1
        self._num_tokens += 1
        reason: FinishReason | None = None
        if token in request.stop_token_ids or token == EOS_ID:
            reason = "stop"
        elif len(request.prompt_token_ids) + num_tokens >= request.max_total_len:
            reason = "length"
        if reason is None:
            self._live[request.request_id] = (request, num_tokens)
        else:
            del self._live[request.request_id]
        if request.pooling is not None:
            return self._embedding_event(request)
        k = request.params.logprobs
        return TokenEvent(
            request_id=_name(request),
            index=index,
            token_id=token,
            text="" if token == EOS_ID else chr(token) * self._text_scale,
            logprob=None if k is None else -0.5,
            top_logprobs=None if k is None else tuple((token + j, -0.5 - j) for j in range(k)),
            finish_reason=reason,
            stop_reason=token if token in request.stop_token_ids else None,
            usage=None if reason is None else self._usage(request, num_tokens),
            choice=request.choice,
            num_open=self._num_open(request),
            prompt_logprobs=_prompt_logprobs(request) if index == 0 else None,
        )

    def _embedding_event(self, request: Request) -> TokenEvent:
        values = embedding_of_prompt(request.prompt_token_ids, request.pooling, request.normalize)
        return TokenEvent(
            request_id=_name(request),
            index=0,
            token_id=None,
            finish_reason="stop",
            usage=self._usage(request, 0),
            embedding=np.array(values, np.float32),
        )

    def _num_open(self, request: Request) -> int:
        return sum(_name(other) == _name(request) for other, _ in self._live.values())

    def _end(self, own_id: str, reason: FinishReason) -> None:
        request, index = self._live.pop(own_id)
        self._last_events.append(
            TokenEvent(
                request_id=_name(request),
                index=index,
                token_id=None,
                finish_reason=reason,
                usage=self._usage(request, index),
                choice=request.choice,
                num_open=self._num_open(request),
            )
        )
        self._set_idle()

    def _set_idle(self) -> None:
        if not self._live:
            self.idle.set()

    @staticmethod
    def _usage(request: Request, num_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=num_tokens,
            cached_tokens=1,
            admitted_at=request.arrival + QUEUE_TIME_S,
        )

    def _on_one_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert threading.get_ident() == self._thread, "the engine was touched by two threads"


def embedding_of_prompt(ids: Sequence[int], pooling: Pooling | None, normalize: bool) -> list[float]:
    """Of two values: the last token's id, or the mean, and 1; over their length if normalised."""
    first = float(ids[-1]) if pooling == "last" else sum(ids) / len(ids)
    length = math.hypot(first, 1.0) if normalize else 1.0
    return [first / length, 1.0 / length]


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...] | None:
    k = request.params.prompt_logprobs
    if k is None or request.choice:
        return None
    scored = [
        TokenLogprobs(token_id=i, logprob=-0.25, top=tuple((i + j, -0.25 - j) for j in range(k)))
        for i in request.prompt_token_ids[1:]
    ]
    return (None, *scored)
