"""``/v1/completions``: texts or token ids, continued."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from jaxserve.errors import RequestError
from jaxserve.request import Request as EngineRequest
from jaxserve.request import TokenEvent
from jaxserve.sampling_params import ALL_LOGPROBS, SamplingParams
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.errors import ANSWERED, HTTPError, body_of, error_of, unfinished
from jaxserve.server.http.fields import (
    BOOLEAN,
    NUM_LOGPROBS,
    PROMPT,
    RESPONSE_FORMAT,
    Body,
    boolean,
    integer,
    num_prompt_logprobs,
    optional,
    priority_of,
    required,
    sampling_params,
    wants_usage,
)
from jaxserve.server.http.generation import Choice, Generation, UsageCount, collected, deadline_of, in_thread, is_small
from jaxserve.server.http.logprobs import CompletionLogprobs, Entry, check_num_values, prompt_logprobs
from jaxserve.server.http.routes import Routes
from jaxserve.server.http.sse import DONE, STREAMED, EventStream, event
from jaxserve.server.http.structured import constraint_name, constraint_of, is_constrained
from jaxserve.server.limits import make_request
from jaxserve.server.prompts import check_bytes, check_fits, tokenizer_of

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 2048
MAX_LOGPROBS = 2**31 - 1  # the engine has a limit of its own


class CompletionRequest(Body):
    prompt: Any = required(PROMPT)
    echo: Any = optional(BOOLEAN)
    logprobs: int | None = None
    prompt_logprobs: Any = optional(NUM_LOGPROBS)
    return_token_ids: Any = optional(BOOLEAN)
    add_special_tokens: Any = optional(BOOLEAN)
    response_format: Any = optional(RESPONSE_FORMAT)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request."""

    requests: list[EngineRequest]
    texts: list[str]  # what ``echo`` puts before each prompt's completions
    echo: bool
    num_top: int | None
    num_prompt_top: int | None  # ``prompt_logprobs``
    drops_output: bool  # max_tokens 0: the engine makes one token, which nobody gets
    returns_ids: bool


def completions_routes(backend: Backend) -> APIRouter:
    router = Routes(tags=["OpenAI"])

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continues each prompt. With `stream`, server-sent events that end with `[DONE]`."""
        model = backend.check_model(body.model)
        in_chunks, in_all = wants_usage(body)
        deadline = deadline_of(http.headers, backend.options)
        name = body.request_id or f"cmpl-{secrets.token_hex(12)}"
        renames = {} if body.prompt_logprobs is not None else {"prompt_logprobs": "logprobs"}
        renames["structured_outputs"] = constraint_name(body, body.response_format)
        is_quick = is_small(http) and not is_constrained(body, body.response_format)
        plan = await in_thread(renames, lambda: _plan(backend, body, name, deadline), is_quick=is_quick)
        head = {"id": name, "object": "text_completion", "created": int(time.time()), "model": model}
        generation = Generation(backend, plan.requests, http)
        if boolean("stream", body.stream, False):
            await generation.start(http.receive)
            chunks = _chunks(backend, plan, generation, head, in_chunks, in_all)
            return EventStream(chunks, backend.options.slow_reader_timeout_s)
        usage = UsageCount(plan.requests, not plan.drops_output)
        choices = await collected(generation, http.receive)
        shown = []
        for i, of_prompt in enumerate(choices):
            for choice in of_prompt:
                shown.append(_choice(backend, plan, i, choice, of_prompt[0], len(shown)))
                usage.add(i, choice.events)
            usage.cached(i, of_prompt[0].usage)
        return JSONResponse({**head, "choices": shown, "usage": usage.total()})

    return router


def _plan(backend: Backend, body: CompletionRequest, name: str, deadline: float | None) -> Plan:
    """In a thread: tokenizes."""
    engine = backend.engine
    echo = boolean("echo", body.echo, False)
    num_top = None if body.logprobs is None else integer("logprobs", body.logprobs, 0, ALL_LOGPROBS, MAX_LOGPROBS)
    num_prompt_top = num_prompt_logprobs(body, body.prompt_logprobs)
    of_prompt = [k for k in (num_top if echo else None, num_prompt_top) if k is not None]
    max_tokens = integer("max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, 0, 2**31 - 1)
    params = sampling_params(
        body,
        engine.sampling_defaults,
        max_tokens=max(max_tokens, 1),
        logprobs=num_top,
        prompt_logprobs=ALL_LOGPROBS if ALL_LOGPROBS in of_prompt else max(of_prompt, default=None),
        **constraint_of(body, body.response_format, None),
    )
    if echo and num_top is not None and params.n > 1 and body.stream:
        raise RequestError("n", f"{params.n}, streamed log-probabilities of the prompt (echo) come with 1")
    if max_tokens == 0 and params.min_tokens:
        raise RequestError("min_tokens", f"{params.min_tokens} is more than max_tokens=0")
    prompts = read_prompts(body.prompt)
    add_special_tokens = boolean("add_special_tokens", body.add_special_tokens, True)
    requests = []
    texts = []
    for i, prompt in enumerate(prompts):
        token_ids = token_ids_of(backend, prompt, add_special_tokens, cut=params.truncate_prompt_tokens is not None)
        if body.max_tokens is None:  # a default is no reason to refuse a prompt
            length = min(len(token_ids), params.truncate_prompt_tokens or len(token_ids))
            room = max(engine.scheduler_config.max_model_len - length, 1)
            limit = backend.options.max_output_tokens or DEFAULT_MAX_TOKENS
            params = replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, limit, room))
        request = make_request(
            engine,
            backend.options,
            token_ids,
            params,
            request_id=name if len(prompts) == 1 else f"{name}-{i}",
            priority=priority_of(body),
            lora=backend.lora_of(body.model),
            deadline=deadline,
        )
        requests.append(request)
        if echo:
            texts.append(_text_of(backend, prompt, request, params))
    check_num_values(requests, engine.model_config.vocab_size)
    return Plan(
        requests=requests,
        texts=texts,
        echo=echo,
        num_top=num_top,
        num_prompt_top=num_prompt_top,
        drops_output=max_tokens == 0,
        returns_ids=boolean("return_token_ids", body.return_token_ids, False),
    )


def token_ids_of(backend: Backend, prompt: str | list[int], add_special_tokens: bool, *, cut: bool) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    tokenizer = tokenizer_of(backend.engine, "prompt")
    check_bytes("prompt", prompt, backend.options.max_prompt_bytes)
    if not cut:
        check_fits(backend.engine, tokenizer, "prompt", prompt)
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def read_prompts(value: Any) -> list[str] | list[list[int]] | list[str | list[int]]:
    """The forms that a prompt may have, as a list. RequestError; token ids are ``make_request``'s to check."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RequestError("prompt", f"{value!r:.80} is not a string, a list of strings, or (a list of) token ids")
    if not value:
        raise RequestError("prompt", "is an empty list")
    others = [i for i, part in enumerate(value) if isinstance(part, bool) or not isinstance(part, int)]
    if not others:
        return [value]
    if others[0] > 0:
        raise RequestError("prompt", f"prompt[{others[0]}] is {value[others[0]]!r:.80}, no token id as prompt[0] is")
    if len(value) > MAX_PROMPTS:
        raise RequestError("prompt", f"{len(value)} prompts in one request, at most {MAX_PROMPTS} are taken")
    for i, part in enumerate(value):
        if not isinstance(part, (str, list)):
            raise RequestError("prompt", f"prompt[{i}] is {part!r:.80}, neither a string nor a list of token ids")
    return value


def _text_of(backend: Backend, prompt: str | list[int], request: EngineRequest, params: SamplingParams) -> str:
    """The prompt as text: as it came, or of the tokens that are left of it."""
    if isinstance(prompt, str) and params.truncate_prompt_tokens is None:
        return prompt
    tokenizer = tokenizer_of(backend.engine, "echo")
    return tokenizer.decode(request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)


def _choice(
    backend: Backend, plan: Plan, request_index: int, choice: Choice, first: Choice, index: int
) -> dict[str, Any]:
    logprobs = None
    tokenizer = backend.engine.tokenizer
    of_prompt = prompt_entries(plan.requests[request_index], first.events)
    events = [] if plan.drops_output else choice.events
    if plan.num_top is not None:
        entries = [*(of_prompt if plan.echo else ()), *entries_of(events)]
        logprobs = CompletionLogprobs(tokenizer, plan.num_top).add(entries)
    shown = {
        "index": index,
        "text": (plan.texts[request_index] if plan.echo else "") + ("" if plan.drops_output else choice.text),
        "logprobs": logprobs,
        "finish_reason": "length" if plan.drops_output else choice.finish_reason,
        "stop_reason": None if plan.drops_output else choice.stop_reason,
    }
    if plan.returns_ids:
        shown["prompt_token_ids"] = list(plan.requests[request_index].prompt_token_ids)
        shown["token_ids"] = token_ids_in(events)
    if plan.num_prompt_top is not None:
        shown["prompt_logprobs"] = prompt_logprobs(tokenizer, of_prompt, plan.num_prompt_top)
    return shown


def token_ids_in(events: Sequence[TokenEvent]) -> list[int]:
    return [e.token_id for e in events if e.token_id is not None]


def entries_of(events: Sequence[TokenEvent]) -> list[Entry]:
    return [(e.token_id, e.logprob, e.top_logprobs or ()) for e in events if e.token_id is not None]


def prompt_entries(request: EngineRequest, events: Sequence[TokenEvent]) -> list[Entry]:
    """Of the prompt's tokens, where the request asks for them: they come with the first choice's first token, and of
    the first token of all there are none."""
    found = next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None)
    if found is None:
        return []
    ids = request.prompt_token_ids
    return [(i, None, ()) if p is None else (p.token_id, p.logprob, p.top) for i, p in zip(ids, found)]


async def _chunks(
    backend: Backend, plan: Plan, generation: Generation, head: dict[str, Any], with_usage: bool, always: bool
) -> AsyncGenerator[bytes]:
    usage = UsageCount(plan.requests, not plan.drops_output)
    begun: dict[int, CompletionLogprobs] = {}
    null_usage = {"usage": None} if with_usage else {}
    try:
        async for i, events in generation:
            usage.add(i, events)
            for of_choice in by_choice(events):
                last = of_choice[-1]
                if (error := unfinished(last.finish_reason, backend.async_engine.state)) is not None:
                    raise error
                index = i * plan.requests[i].params.n + last.choice
                first = index not in begun
                if first:
                    begun[index] = CompletionLogprobs(backend.engine.tokenizer, plan.num_top or 0)
                text = "" if plan.drops_output else "".join(e.text for e in of_choice)
                entries = [] if plan.drops_output else entries_of(of_choice)
                if first and plan.echo:
                    text = plan.texts[i] + text
                    entries = [*prompt_entries(plan.requests[i], of_choice), *entries]
                has_logprobs = plan.num_top is not None and entries
                ids = token_ids_in(of_choice) if plan.returns_ids and not plan.drops_output else []
                if not (text or has_logprobs or ids or first or last.finish_reason):
                    continue
                choice = {
                    "index": index,
                    "text": text,
                    "logprobs": begun[index].add(entries) if has_logprobs else None,
                    "finish_reason": "length" if plan.drops_output and last.finish_reason else last.finish_reason,
                    "stop_reason": None if plan.drops_output else last.stop_reason,
                }
                if plan.returns_ids:
                    choice["token_ids"] = ids
                    if first:
                        choice["prompt_token_ids"] = list(plan.requests[i].prompt_token_ids)
                yield event({**head, "choices": [choice], **({"usage": usage.total()} if always else null_usage)})
        if with_usage:
            yield event({**head, "choices": [], "usage": usage.total()})
    except (*ANSWERED, HTTPError) as error:
        yield event(body_of(error_of(error)))
        return
    finally:
        await generation.aclose()
    yield DONE


def by_choice(events: Sequence[TokenEvent]) -> list[list[TokenEvent]]:
    """Events of one request, those of each choice together."""
    choices: dict[int, list[TokenEvent]] = {}
    for e in events:
        choices.setdefault(e.choice, []).append(e)
    return list(choices.values())
