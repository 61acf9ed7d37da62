"""The fields of a request's body: which are applied, which change nothing here, which are refused.

Sampling fields are named as in ``SamplingParams``, which checks their values: the JSON schemas here are for the OpenAPI
document. A field of None is unset.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxserve.errors import RequestError
from jaxserve.sampling_params import ALL_LOGPROBS, SamplingParams, sampling_params_from

NO_OPS = {
    "user": "who asks: nothing is kept about users",
    "safety_identifier": "as user",
    "metadata": "for stored completions: nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one",
    "prompt_cache_key": "prefixes are found by their tokens",
    "prompt_cache_retention": "prefixes stay until their pages are wanted",
}  # taken and without effect on any answer: field -> why

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "nothing is inserted before a suffix: send a fill-in-the-middle prompt"),
    "best_of": ((1,), "only n completions are made, none is chosen among more"),
    "functions": (([],), "deprecated: send tools"),
    "function_call": ((), "deprecated: send tool_choice"),
    "modalities": ((["text"],), "only text is made"),
    "audio": ((), "only text is made"),
    "prediction": ((), "predicted outputs are not implemented"),
    "web_search_options": ((), "there is no web search"),
    "verbosity": (("medium",), "the model knows no such control"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "spaces_between_special_tokens": ((True,), "text is the concatenation of its tokens' text"),
}  # known elsewhere: field -> values that ask for nothing, and why others are refused


def optional(schema: dict[str, Any]) -> Any:
    """A field that may be left out, of any value: ``schema`` is for the OpenAPI document."""
    return Field(default=None, json_schema_extra={"anyOf": [schema, {"type": "null"}]})


def required(schema: dict[str, Any]) -> Any:
    return Field(json_schema_extra=schema)


def _listed(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


_TOKEN_ID = {"type": "integer", "minimum": 0}
_STRING = {"type": "string"}
_TEXT = {"type": "string", "minLength": 1}

BOOLEAN = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 1}
NUM_LOGPROBS = {"type": "integer", "minimum": ALL_LOGPROBS}
PRIORITY = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
TEXTS = _listed(_TEXT)
TOKEN_IDS = _listed(_TOKEN_ID)
NULL = {"type": "null"}
OBJECT = {"type": "object"}
OBJECTS = _listed(OBJECT)
PROMPT = {"anyOf": [_TEXT, _listed(_TEXT), _listed(_TOKEN_ID), _listed(_listed(_TOKEN_ID))]}
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _STRING},
}
CONTENT = {"anyOf": [_STRING, _listed(TEXT_PART)]}
TOOL_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": _STRING,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": _TEXT, "arguments": {"anyOf": [_STRING, OBJECT]}},
        },
    },
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": _STRING},
        "anyOf": [
            {"required": ["content"], "properties": {"content": CONTENT}},
            {
                "required": ["tool_calls"],
                "properties": {
                    "content": {"anyOf": [CONTENT, NULL]},
                    "tool_calls": {**_listed(TOOL_CALL), "minItems": 1},
                },
            },
        ],
    },
}
TOOLS = _listed(
    {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": _TEXT, "description": _STRING, "parameters": {"anyOf": [OBJECT, NULL]}},
            },
        },
    }
)
TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
            },
        },
    ]
}
RESPONSE_FORMAT = {
    "type": "object",
    "required": ["type"],
    "anyOf": [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "required": ["json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {"type": "object", "required": ["schema"], "properties": {"schema": OBJECT}},
            },
        },
    ],
}
STRUCTURED_OUTPUTS = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [OBJECT, _STRING]},
        "regex": _STRING,
        "choice": {**TEXTS, "minItems": 1},
        "grammar": _STRING,
        "json_object": {"const": True},
    },
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
STREAM_OPTIONS = {
    "type": "object",
    "properties": {
        "include_usage": BOOLEAN,
        "continuous_usage_stats": BOOLEAN,
        "include_obfuscation": {"const": False},
    },
    "additionalProperties": False,
}


def prompt_or_messages(of_prompt: Iterable[str] = (), of_messages: Iterable[str] = ()) -> dict[str, Any]:
    """The schema of a body that has either, with the fields that go with one of them only."""

    def one(name: str, others: Iterable[str]) -> dict[str, Any]:
        return {"required": [name], "properties": {name: {"not": NULL}, **{other: NULL for other in others}}}

    return {
        "oneOf": [one("prompt", ("messages", *of_messages)), one("messages", ("prompt", *of_prompt))],
    }


class Body(BaseModel):
    """What every generating request may have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    # SamplingParams.
    max_tokens: Any = optional({"type": "integer", "minimum": 0})
    min_tokens: Any = optional({"type": "integer", "minimum": 0})
    temperature: Any = optional({"type": "number", "minimum": 0})
    top_p: Any = optional({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
    top_k: Any = optional({"type": "integer", "minimum": -1})
    min_p: Any = optional({"type": "number", "minimum": 0, "maximum": 1})
    seed: Any = optional({"type": "integer", "minimum": 0, "maximum": 2**64 - 1})
    stop: Any = optional({"anyOf": [_TEXT, _listed(_TEXT)]})
    stop_token_ids: Any = optional(TOKEN_IDS)
    include_stop_str_in_output: Any = optional(BOOLEAN)
    ignore_eos: Any = optional(BOOLEAN)
    skip_special_tokens: Any = optional(BOOLEAN)
    n: Any = optional(COUNT)
    presence_penalty: Any = optional({"type": "number", "minimum": -2, "maximum": 2})
    frequency_penalty: Any = optional({"type": "number", "minimum": -2, "maximum": 2})
    repetition_penalty: Any = optional({"type": "number", "exclusiveMinimum": 0})
    logit_bias: Any = optional(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]+$"},
        }
    )
    allowed_token_ids: Any = optional({**_listed(_TOKEN_ID), "minItems": 1})
    bad_words: Any = optional(TEXTS)
    truncate_prompt_tokens: Any = optional(COUNT)
    # What the answer is held to (``structured``).
    structured_outputs: Any = optional(STRUCTURED_OUTPUTS)
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Any = optional(TEXTS)
    guided_grammar: str | None = None
    # Of the request.
    priority: Any = optional(PRIORITY)
    stream_options: Any = optional(STREAM_OPTIONS)
    request_id: str | None = None
    stream_interval: Any = optional(COUNT)
    stream_max_delay_s: Any = optional({"type": "number", "minimum": 0})

    @model_validator(mode="before")
    @classmethod
    def _known_elsewhere(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NO_OPS:
                continue
            elif name in REFUSED:
                neutral, why = REFUSED[name]
                # By type too: True is no 1.
                if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
                    raise RequestError(name, why)
            else:
                raise RequestError(name[:80], "unknown field")
        return kept

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the fields ``names`` that are set."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
SAMPLING_FIELDS = tuple(
    name
    for name in SamplingParams.__dataclass_fields__
    if name in Body.model_fields and name != "structured_outputs"  # which has fields of its own
)


def sampling_params(body: Body, defaults: Mapping[str, Any], **fields: Any) -> SamplingParams:
    """``SamplingParams`` of the body's fields, of ``fields`` where those are not None, of ``defaults`` elsewhere.

    Raises RequestError naming the field.
    """
    given = body.given(SAMPLING_FIELDS)
    for name in LISTS:
        if name in given and not isinstance(given[name], list if name != "stop" else (list, str)):
            raise RequestError(name, f"{given[name]!r:.80} is not a list")
    if "logit_bias" in given:
        given["logit_bias"] = _logit_bias(given["logit_bias"])
    given |= {name: value for name, value in fields.items() if value is not None}
    return sampling_params_from({**defaults, **given})


def _logit_bias(values: Any) -> Any:
    """With token ids for keys: JSON's are strings. What they are not is ``SamplingParams``' to refuse."""
    if not isinstance(values, dict):
        return values
    return {int(key) if re.fullmatch("[0-9]{1,12}", key) else key: value for key, value in values.items()}


def boolean(name: str, value: Any, default: bool) -> bool:
    """``value``, or ``default`` where it is None. Raises RequestError."""
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(name, f"{value!r:.80} is not true or false")
    return value


def num_prompt_logprobs(body: Body, value: Any) -> int | None:
    """``prompt_logprobs``, checked; None: unset."""
    if value is None:
        return None
    if body.stream:
        raise RequestError("prompt_logprobs", "come with whole answers: stream is true")
    return integer("prompt_logprobs", value, 0, ALL_LOGPROBS, 2**31 - 1)


def continuation_of(add_generation_prompt: Any, continue_final_message: Any) -> dict[str, Any]:
    """Both fields, checked, for ``encode_conversation``; an ``add_generation_prompt`` of None is unset."""
    adds = None if add_generation_prompt is None else boolean("add_generation_prompt", add_generation_prompt, True)
    continues = boolean("continue_final_message", continue_final_message, False)
    return {"add_generation_prompt": adds, "continue_final_message": continues}


def integer(name: str, value: Any, default: int, least: int, most: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, f"{value!r:.80} is not an integer")
    if not least <= value <= most:
        raise RequestError(name, f"{value} is not in [{least}, {most}]")
    return value


def priority_of(body: Body) -> int:
    return integer("priority", body.priority, 0, -(2**31), 2**31 - 1)


def wants_usage(body: Body) -> tuple[bool, bool]:
    """Of ``stream_options``: whether a last chunk, without choices, has the usage, and whether every chunk has it so
    far."""
    options = body.stream_options
    if options is None:
        return False, False
    if not isinstance(options, dict):
        raise RequestError("stream_options", f"{options!r:.80} is not an object")
    if not body.stream:
        raise RequestError("stream_options", "set, but stream is not")
    for name in options:
        if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            raise RequestError(f"stream_options.{name[:80]}", "unknown field")
    if boolean("stream_options.include_obfuscation", options.get("include_obfuscation"), False):
        raise RequestError("stream_options.include_obfuscation", "no padding is sent")
    at_end = boolean("stream_options.include_usage", options.get("include_usage"), False)
    always = boolean("stream_options.continuous_usage_stats", options.get("continuous_usage_stats"), False)
    return at_end, always
