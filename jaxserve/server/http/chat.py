"""``/v1/chat/completions``: conversations, with tools."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from jaxserve.errors import RequestError
from jaxserve.request import Request as EngineRequest
from jaxserve.request import TokenEvent
from jaxserve.sampling_params import ALL_LOGPROBS
from jaxserve.server.chat.conversation import encode_conversation
from jaxserve.server.chat.tools import Answer, ToolPlan, tool_plan
from jaxserve.server.http.backend import Backend
from jaxserve.server.http.completions import by_choice, entries_of, prompt_entries, token_ids_in
from jaxserve.server.http.errors import ANSWERED, HTTPError, body_of, error_of, unfinished
from jaxserve.server.http.fields import (
    BOOLEAN,
    COUNT,
    MESSAGES,
    NUM_LOGPROBS,
    OBJECT,
    OBJECTS,
    RESPONSE_FORMAT,
    TOOL_CHOICE,
    TOOLS,
    Body,
    boolean,
    continuation_of,
    integer,
    num_prompt_logprobs,
    optional,
    priority_of,
    required,
    sampling_params,
    wants_usage,
)
from jaxserve.server.http.generation import Choice, Generation, UsageCount, collected, deadline_of, in_thread
from jaxserve.server.http.logprobs import chat_logprobs, check_num_values, prompt_logprobs
from jaxserve.server.http.routes import Routes
from jaxserve.server.http.sse import DONE, STREAMED, EventStream, event
from jaxserve.server.http.structured import constraint_name, constraint_of
from jaxserve.server.http.tools import call_delta, message_of
from jaxserve.server.limits import make_request
from jaxserve.server.tool_calls import Content


class ChatRequest(Body):
    messages: Any = required(MESSAGES)
    max_completion_tokens: Any = optional(COUNT)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: Any = optional(NUM_LOGPROBS)
    return_token_ids: Any = optional(BOOLEAN)
    tools: Any = optional(TOOLS)
    tool_choice: Any = optional(TOOL_CHOICE)
    parallel_tool_calls: Any = optional(BOOLEAN)
    response_format: Any = optional(RESPONSE_FORMAT)
    add_generation_prompt: Any = optional(BOOLEAN)
    continue_final_message: Any = optional(BOOLEAN)
    chat_template_kwargs: Any = optional(OBJECT)
    documents: Any = optional(OBJECTS)
    reasoning_effort: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request."""

    request: EngineRequest
    tools: ToolPlan
    num_top: int | None  # log-probabilities of so many
    num_prompt_top: int | None  # of the prompt's tokens
    returns_ids: bool


def chat_routes(backend: Backend) -> APIRouter:
    router = Routes(tags=["OpenAI"])

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """The next message of a conversation. With `stream`, server-sent events that end with `[DONE]`."""
        model = backend.check_model(body.model)
        in_chunks, in_all = wants_usage(body)
        deadline = deadline_of(http.headers, backend.options)
        name = body.request_id or f"chatcmpl-{secrets.token_hex(12)}"
        renames = {"prompt": "messages", "logprobs": "top_logprobs"}
        renames["structured_outputs"] = constraint_name(body, body.response_format, body.tool_choice)
        if body.max_completion_tokens is not None:
            renames["max_tokens"] = "max_completion_tokens"
        plan = await in_thread(renames, lambda: _plan(backend, body, name, deadline))
        head = {"id": name, "object": "chat.completion", "created": int(time.time()), "model": model}
        generation = Generation(backend, [plan.request], http)
        if boolean("stream", body.stream, False):
            await generation.start(http.receive)
            chunks = _chunks(backend, plan, generation, head, in_chunks, in_all)
            return EventStream(chunks, backend.options.slow_reader_timeout_s)
        (choices,) = await collected(generation, http.receive)
        usage = UsageCount([plan.request])
        usage.cached(0, choices[0].usage)
        for choice in choices:
            usage.add(0, choice.events)
        answer = head | {"choices": [_choice(backend, plan, choice, i) for i, choice in enumerate(choices)]}
        if plan.returns_ids:
            answer["prompt_token_ids"] = list(plan.request.prompt_token_ids)
        if plan.num_prompt_top is not None:
            entries = prompt_entries(plan.request, choices[0].events)
            answer["prompt_logprobs"] = prompt_logprobs(backend.engine.tokenizer, entries, plan.num_prompt_top)
        return JSONResponse(answer | {"usage": usage.total()})

    return router


def _plan(backend: Backend, body: ChatRequest, name: str, deadline: float | None) -> Plan:
    """In a thread: renders and tokenizes."""
    engine = backend.engine
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs", f"{body.top_logprobs}, but logprobs is not true")
    num_top = integer("top_logprobs", body.top_logprobs, 0, ALL_LOGPROBS, 2**31 - 1) if body.logprobs else None
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RequestError("max_completion_tokens", f"{body.max_completion_tokens}, but max_tokens={body.max_tokens}")
    num_prompt_top = num_prompt_logprobs(body, body.prompt_logprobs)
    parallel = boolean("parallel_tool_calls", body.parallel_tool_calls, True)
    tools = tool_plan(engine, backend.options, body.tools, body.tool_choice, parallel=parallel)
    params = sampling_params(
        body,
        engine.sampling_defaults,
        max_tokens=body.max_completion_tokens,
        logprobs=num_top,
        prompt_logprobs=num_prompt_top,
        skip_special_tokens=tools.skips_special_tokens(body.skip_special_tokens),
        **constraint_of(body, body.response_format, tools.schema),
    )
    variables = body.chat_template_kwargs
    if body.reasoning_effort is not None:
        variables = {"reasoning_effort": body.reasoning_effort} | (variables if isinstance(variables, dict) else {})
    token_ids = encode_conversation(
        engine,
        body.messages,
        backend.options.max_prompt_bytes,
        cut=params.truncate_prompt_tokens is not None,
        **continuation_of(body.add_generation_prompt, body.continue_final_message),
        tools=tools.tools,
        documents=body.documents,
        variables=variables,
    )
    request = make_request(
        engine,
        backend.options,
        token_ids,
        params,
        request_id=name,
        priority=priority_of(body),
        deadline=deadline,
        lora=backend.lora_of(body.model),
    )
    check_num_values([request], engine.model_config.vocab_size)
    return Plan(
        request=request,
        tools=tools,
        num_top=num_top,
        num_prompt_top=num_prompt_top,
        returns_ids=boolean("return_token_ids", body.return_token_ids, False),
    )


def _logprobs(backend: Backend, plan: Plan, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
    if plan.num_top is None:
        return None
    return chat_logprobs(backend.engine.tokenizer, entries_of(events), plan.num_top)


def _choice(backend: Backend, plan: Plan, choice: Choice, index: int) -> dict[str, Any]:
    answer = Answer(plan.tools)
    message = message_of(answer.add(choice.text, at_end=True))
    shown = {
        "index": index,
        "message": message,
        "logprobs": _logprobs(backend, plan, choice.events),
        "finish_reason": answer.finish_reason(choice.finish_reason),
        "stop_reason": choice.stop_reason,
    }
    return shown | {"token_ids": token_ids_in(choice.events)} if plan.returns_ids else shown


async def _chunks(
    backend: Backend, plan: Plan, generation: Generation, head: dict[str, Any], with_usage: bool, always: bool
) -> AsyncGenerator[bytes]:
    usage = UsageCount([plan.request])
    head = {**head, "object": "chat.completion.chunk"}
    if plan.returns_ids:
        head["prompt_token_ids"] = list(plan.request.prompt_token_ids)
    answers: dict[int, Answer] = {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None, ids: Sequence[int] = ()
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if plan.returns_ids:
            choice["token_ids"] = list(ids)
        shown = {"usage": usage.total() if always else None} if with_usage or always else {}
        return event({**head, "choices": [choice], **shown})

    try:
        async for _, events in generation:
            usage.add(0, events)
            for of_choice in by_choice(events):
                last = of_choice[-1]
                if (error := unfinished(last.finish_reason, backend.async_engine.state)) is not None:
                    raise error
                index = last.choice
                if index not in answers:
                    answers[index] = Answer(plan.tools)
                    yield chunk(index, {"role": "assistant", "content": ""})
                    head.pop("prompt_token_ids", None)  # the first chunk has them
                text = "".join(e.text for e in of_choice)
                logprobs = _logprobs(backend, plan, of_choice)
                ids = token_ids_in(of_choice) if plan.returns_ids else []
                for delta in answers[index].add(text, at_end=last.finish_reason is not None):
                    shown = (
                        {"content": delta.text} if isinstance(delta, Content) else {"tool_calls": [call_delta(delta)]}
                    )
                    yield chunk(index, shown, logprobs, ids=ids)
                    logprobs, ids = None, []  # once
                if ids or (logprobs is not None and logprobs["content"]):
                    yield chunk(index, {"content": ""}, logprobs, ids=ids)
                if last.finish_reason is not None:
                    yield chunk(index, {}, None, answers[index].finish_reason(last.finish_reason))
        if with_usage:
            yield event({**head, "choices": [], "usage": usage.total()})
    except (*ANSWERED, HTTPError) as error:
        yield event(body_of(error_of(error)))
        return
    finally:
        await generation.aclose()
    yield DONE
