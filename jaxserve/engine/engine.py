"""The synchronous core: requests in, token events out, one step at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import numpy as np

from jaxserve.config import LoraConfig, ModelConfig
from jaxserve.engine.construction import GivenParams, build_parts, placed_params
from jaxserve.engine.door import Conversation, Prompt, encode_conversations, listed_prompts
from jaxserve.engine.interrupts import interrupts_held
from jaxserve.engine.loading import LoadFormat, opened_model
from jaxserve.engine.loop import StepLoop
from jaxserve.engine.loras import PlacedLora
from jaxserve.engine.mirror import LeadingRunner
from jaxserve.engine.options import EngineOptions, check_names
from jaxserve.engine.output import completions_of, embedding_of
from jaxserve.engine.step_times import StepTimes
from jaxserve.errors import QueueFullError, RequestError
from jaxserve.execution.step import StageParams
from jaxserve.model.lora import Adapter
from jaxserve.request import Completion, Embedding, EngineStats, LoadedAdapter, PageMap, Pooling, Request, TokenEvent
from jaxserve.sampling_params import SamplingParams, sampling_params_from
from jaxserve.text.tokenizer import Tokenizer


class Engine:
    """A model, its paged KV cache and its scheduler. A constructed engine is ready: every step shape is compiled.

    Make one with ``from_pretrained`` or ``from_params``. One thread at a time may use it (``make_request`` and
    ``stats`` excepted); servers put an ``AsyncEngine`` around it. Ctrl-C is held back until a step has ended, so that
    an interrupted engine goes on; after an error in a step every call says so, and a new engine is needed.

    Attributes:
        model_name, model_config, cache_config, scheduler_config, parallel_config, dtype: what was resolved.
        sampling_defaults: what ``default_sampling_params`` starts from.
        tokenizer: None where the engine was made without; prompts are then token ids and completions have no text.
        replicas: the step loops: for tests and benchmarks.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        load_format: LoadFormat = "auto",
        skip_tokenizer_init: bool = False,
        generation_config: Literal["auto", "none"] = "auto",
        quantization: str = "auto",
        model_name: str | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """An engine from a checkpoint: a known name, a GGUF file, or a folder with one or in the Hugging Face layout.

        Args:
            name_or_path, load_format, skip_tokenizer_init, generation_config, quantization: see
                ``loading.opened_model``.
            model_name, sampling_defaults: as for ``from_params``; None are the checkpoint's own.
            options: see ``EngineOptions``.

        Raises:
            CheckpointError: nothing is found under that name, or the file cannot be used; names the tensor or offset.
            TypeError: an option that no engine has.
            ValueError: an option that does not fit the model or the memory, with both numbers.
        """
        check_names(options)
        with opened_model(
            name_or_path,
            load_format=load_format,
            skip_tokenizer_init=skip_tokenizer_init,
            generation_config=generation_config,
            quantization=quantization,
            on_progress=options.get("on_progress"),
        ) as model:
            return cls(
                model.config,
                model.params,
                model.tokenizer,
                model_name=model.name if model_name is None else model_name,
                sampling_defaults=model.sampling_defaults if sampling_defaults is None else sampling_defaults,
                **options,
            )

    @classmethod
    def from_params(
        cls,
        model_config: ModelConfig,
        params: GivenParams,
        tokenizer: Tokenizer | None = None,
        *,
        model_name: str = "model",
        sampling_defaults: Mapping[str, Any] | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """An engine over live arrays (``jaxserve.model.params`` has the tree and its layout); as the constructor."""
        return cls(
            model_config, params, tokenizer, model_name=model_name, sampling_defaults=sampling_defaults, **options
        )

    def __init__(
        self,
        model_config: ModelConfig,
        params: GivenParams,
        tokenizer: Tokenizer | None = None,
        *,
        model_name: str = "model",
        sampling_defaults: Mapping[str, Any] | None = None,
        **options: Unpack[EngineOptions],
    ):
        """
        Args:
            model_config: the model; its ``eos_token_ids`` and the tokenizer's end a generation.
            params: canonical ``Params`` of numpy or jax arrays, in any dtype; or where to read them from, part by part;
                or ``StageParams`` that lie on the mesh in the engine's dtype already; or ``DummyWeights``.
            sampling_defaults: fields of ``SamplingParams`` that a request has where it does not say otherwise.
            options: see ``EngineOptions``.

        Raises:
            TypeError, ValueError: as ``from_pretrained``.
        """
        check_names(options)
        self.sampling_defaults = dict(sampling_defaults or {})
        try:
            self.default_sampling_params()
        except RequestError as error:
            raise ValueError(
                f"the model's default {error}: start without its defaults (generation_config='none')"
            ) from None
        self.model_name, self.model_config, self.tokenizer = model_name, model_config, tokenizer
        parts = build_parts(model_config, params, tokenizer, base_names=(model_name,), **options)
        self.parallel_config, self.dtype = parts.parallel_config, parts.dtype
        self.scheduler_config, self.cache_config = parts.scheduler_config, parts.cache_config
        self.replicas, self._door, self._loras = parts.replicas, parts.door, parts.loras
        self._events: list[TokenEvent] = []  # for the next ``step``
        self._inboxes: dict[str, deque[TokenEvent]] = {}  # requests of ``generate`` and ``stream``
        self._closed = False
        self._failure: BaseException | None = None

    @property
    def loop(self) -> StepLoop:
        """The step loop of the first replica, its scheduler and its runner: for tests and benchmarks."""
        return self.replicas.loops[0]

    def default_sampling_params(self, **fields: Any) -> SamplingParams:
        """The model's own sampling with ``fields`` instead of what it says of them.

        Raises:
            RequestError: a field's value is refused; names the field.
        """
        return sampling_params_from(self.sampling_defaults | fields)

    # Whole requests.

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Completes every prompt (text or token ids), batched together, and returns them in the prompts' order,
        a prompt's ``n`` choices one after another.

        Args:
            prompts: one prompt or several; token ids may be arrays, each row a prompt.
            params: for all prompts, or one for each; None is ``default_sampling_params()``.
            lora: name of the loaded adapter, for all prompts or one for each; None is the base model.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing was started.
        """
        listed = listed_prompts(prompts)
        if not isinstance(params, Sequence):
            params = [self.default_sampling_params() if params is None else params] * len(listed)
        if len(params) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(params)} SamplingParams")
        loras = [lora] * len(listed) if lora is None or isinstance(lora, str) else lora
        if len(loras) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(loras)} names of adapters")
        requests = [self.make_request(p, s, lora=name) for p, s, name in zip(listed, params, loras, strict=True)]
        events = self._run(requests)
        return [c for request in requests for c in completions_of(request, events[request.request_id])]

    def chat(
        self,
        messages: Conversation | Iterable[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        **template: Any,
    ) -> list[Completion]:
        """Answers one conversation or several: ``generate`` of what the model's chat template makes of them.

        Args:
            messages: of OpenAI's API, ``[{"role": "user", "content": "hi"}]``, or several lists of them.
            params, lora: as for ``generate``, for all or one for each conversation.
            template: what else ``Tokenizer.render_chat`` takes, such as ``tools``; calls are in the answer's text, as
                the model writes them.

        Raises:
            RequestError: messages that the template refuses, a model without one, or as ``generate``.
        """
        return self.generate(encode_conversations(self.tokenizer, messages, template), params, lora=lora)

    def _run(self, requests: list[Request]) -> dict[str, list[TokenEvent]]:
        """All events of each request, when all have ended."""
        num_ended = 0
        waiting = deque(requests)
        inbox = deque[TokenEvent]()  # of all of them
        collected: dict[str, list[TokenEvent]] = {r.request_id: [] for r in requests}
        self._inboxes |= dict.fromkeys(collected, inbox)
        try:
            while num_ended < len(requests):
                while waiting:
                    try:
                        self.add_request(waiting[0])
                    except QueueFullError:
                        break
                    waiting.popleft()
                self._step()
                while inbox:
                    event = inbox.popleft()
                    collected[event.request_id].append(event)
                    num_ended += event.ends_request
        finally:
            for request in requests:
                self._drop(request.request_id)
        return collected

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Iterator[TokenEvent]:
        """Events of one request as its tokens appear. Closing the iterator aborts it; streams may be interleaved."""
        request = self.make_request(prompt, params or self.default_sampling_params(), lora=lora)
        inbox = self._inboxes[request.request_id] = deque()
        try:
            self.add_request(request)
            while True:
                while inbox:
                    event = inbox.popleft()
                    yield event
                    if event.ends_request:
                        return
                self._step()
        finally:
            self._drop(request.request_id)

    def _drop(self, request_id: str) -> None:
        """Ends a request whose reader has gone, and its inbox."""
        self.abort(request_id)
        self._inboxes.pop(request_id, None)
        self._events = [e for e in self._events if e.request_id != request_id]

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
        lora: str | None = None,
    ) -> list[Embedding]:
        """Every prompt as a vector of the model's width, in the prompts' order: the hidden state after the final norm
        of its last token, or the mean over all its tokens.

        Args:
            normalize: the vector has length 1.
            truncate_prompt_tokens: only so many of a prompt's last tokens are read.
            lora: name of the loaded adapter; None is the base model.

        Raises:
            RequestError: a prompt that cannot be read; nothing was started.
        """
        options: dict[str, Any] = {
            "normalize": normalize, "truncate_prompt_tokens": truncate_prompt_tokens, "lora": lora
        }  # fmt: skip
        requests = [
            self.make_embedding_request(prompt, pooling=pooling, **options) for prompt in listed_prompts(prompts)
        ]
        events = self._run(requests)
        return [embedding_of(request, events[request.request_id][-1]) for request in requests]

    # Single steps.

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request:
        """Checks a prompt and its parameters against this engine's limits. Pure; any thread may call it.

        Args:
            deadline: ``time.monotonic()`` seconds at which the request ends with finish reason "deadline".
            lora: name of the loaded adapter; None is the base model.

        Raises:
            RequestError: names the field, with both numbers.
        """
        return self._door.make_request(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            deadline=deadline,
            adapter=None if lora is None else self._loras.find(lora),
        )

    def make_embedding_request(
        self,
        prompt: Prompt,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        lora: str | None = None,
    ) -> Request:
        """As ``make_request``, of a request for an embedding: its only event has it, and no token."""
        return self._door.make_embedding_request(
            prompt,
            pooling=pooling,
            normalize=normalize,
            truncate_prompt_tokens=truncate_prompt_tokens,
            request_id=request_id,
            priority=priority,
            deadline=deadline,
            adapter=None if lora is None else self._loras.find(lora),
        )

    def add_request(self, request: Request) -> None:
        """Queues a request of ``make_request``.

        Raises:
            QueueFullError: ``max_num_waiting`` requests wait already.
            RequestError: its id is in use, it cannot be served by this engine's cache, or its adapter was unloaded.
        """
        self._check_usable()
        self._loras.check_loaded(request)
        with interrupts_held():
            self.replicas.add(request)

    def abort(self, request_id: str) -> bool:
        """Ends a request at once and frees its pages; its last event comes with the next ``step``. False if unknown."""
        with interrupts_held():
            was_known = self.replicas.abort(request_id)
            self._take_events()
            return was_known

    def has_unfinished(self) -> bool:
        """Whether ``step`` has anything to do: requests, steps in flight, or events to hand out."""
        return self.replicas.has_unfinished() or bool(self._events)

    def step(
        self,
        on_dispatch: Callable[[EngineStats], None] | None = None,
        on_times: Callable[[StepTimes], None] | None = None,
    ) -> list[TokenEvent]:
        """Schedules and dispatches one step, and returns the events of the one before it (of itself at lookahead 0).
        With replicas one of each that has none under way, and the events of those that have come to their ends: after
        a few milliseconds there may be none.

        ``on_dispatch`` is called with the figures of the moment the device spends its time in: after a dispatch, before
        what the step before ended is freed. ``on_times`` is called last, with what the step did.
        """
        self._step(on_dispatch, on_times)
        events, self._events = self._events, []
        return events

    def _step(
        self,
        on_dispatch: Callable[[EngineStats], None] | None = None,
        on_times: Callable[[StepTimes], None] | None = None,
    ) -> None:
        self._check_usable()
        # A step cut short would leave the scheduler and the device with different ideas of what is in the pages.
        with interrupts_held():
            try:
                times: list[StepTimes] = []
                self.replicas.advance(on_dispatch and (lambda: on_dispatch(self.stats())), times.append)
            except BaseException as error:
                self._failure = error
                raise
        self._take_events()
        if on_times is not None:
            for each in times:
                on_times(each)

    def _take_events(self) -> None:
        """From the loop to whom they are for."""
        for event in self.replicas.take_events():
            inbox = self._inboxes.get(event.request_id)
            (self._events if inbox is None else inbox).append(event)

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._failure is not None:
            raise RuntimeError(f"the engine failed in an earlier step, make a new one: {self._failure!r}")

    # New weights.

    def update_params(self, params: GivenParams) -> None:
        """Serves other weights of the same model from the next step on, without compiling anything.

        Running requests go on: what they have said stays, their K/V is computed anew, and every token from here on is
        the new weights' (one that a step in flight has already sampled excepted). The prefix cache is dropped. After an
        error the engine goes on with the weights it had. Device memory holds both sets for a moment; live jax arrays
        that lie where the engine wants them are shared, not copied: do not donate them while the engine uses them.

        Args:
            params: as for ``from_params``; an open checkpoint is a ``ParamSource``, too.

        Raises:
            ValueError: names the first parameter that is missing, extra or of another shape, with both shapes.
        """
        self._check_usable()
        placed = self._placed(params)
        with interrupts_held():
            self.replicas.update_params(placed)

    def load_params(self, name_or_path: str | Path) -> StageParams:
        """The weights of a checkpoint of the same model, where this engine wants them, for ``update_params``. Any
        thread may call it while another one runs the engine.

        Raises:
            CheckpointError: as ``from_pretrained``.
            ValueError: as ``update_params``.
        """
        with opened_model(name_or_path, skip_tokenizer_init=True) as model:
            placed = self._placed(model.params)
        if isinstance(self.loop.runner, LeadingRunner):
            self.loop.runner.have_read(placed, name_or_path)
        return placed

    def _placed(self, params: GivenParams) -> StageParams:
        runner = self.loop.runner
        return placed_params(params, self.model_config, runner.config, runner.mesh, np.dtype(self.dtype))

    # Adapters.

    @property
    def lora_config(self) -> LoraConfig | None:
        """The room that there is for adapters; None: none."""
        return self._loras.config

    def load_lora(self, name: str, path: str | Path) -> LoadedAdapter:
        """Loads the LoRA adapter in a folder as `peft` saves it: requests made from now on may name it, beside others.
        Nothing is compiled, and running requests do not notice. Of an engine of several hosts each reads the folder of
        that name that it has.

        Raises:
            CheckpointError: the adapter cannot be used, with the key or tensor at fault and both numbers.
            ValueError: another host cannot read it, or has another one there; says which, and why.
            RequestError: the name is taken, or there is no room (``max_loras``).
        """
        return self.add_lora(name, self.read_lora(path))

    def read_lora(self, path: str | Path, digest: str | None = None) -> PlacedLora:
        """The adapter in a folder, on the devices, for ``add_lora``. Any thread may call it while another one runs the
        engine. Raises as ``load_lora``, and ValueError where it is not of that ``digest``
        (``model.lora.adapter_digest``)."""
        return self._loras.read(path, digest)

    def add_lora(self, name: str, adapter: Adapter | PlacedLora) -> LoadedAdapter:
        """As ``load_lora``, an adapter of ``read_lora`` or of live arrays (``model.lora.Adapter``), which an engine of
        several hosts does not take."""
        self._check_usable()
        with interrupts_held(), self.replicas.watch():
            return self._loras.add(name, self._loras.place(adapter) if isinstance(adapter, Adapter) else adapter)

    def unload_lora(self, name: str) -> None:
        """No request made from now on may name the adapter. Those that do go on with it; its room is free for another
        when the last of them has ended.

        Raises:
            UnknownLoraError: it is not loaded.
        """
        self._check_usable()
        self._loras.unload(name)

    def list_loras(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that requests may name, in the order of their loading. Any thread."""
        return self._loras.loaded()

    # Figures and end.

    def stats(self) -> EngineStats:
        """Figures of now. Read from another thread they may be of neighbouring steps."""
        return self.replicas.stats(self._loras.loads())

    def page_map(self) -> PageMap:
        """Who holds which KV pages. Between two steps only, as ``step``."""
        return self.replicas.page_map()

    def close(self) -> None:
        """Frees the device's memory. Unfinished requests are dropped. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self.replicas.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
