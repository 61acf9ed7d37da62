"""What an answer is held to: OpenAI's ``response_format``, and the fields that vLLM's clients send."""

from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.http.fields import Body

KINDS = ("json", "regex", "choice", "grammar", "json_object")
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def constraint_of(body: Body, response_format: Any, schema: dict[str, Any] | None) -> dict[str, Any]:
    """The sampling field that holds the answer to what the request says, if it says so; one way of saying it at most.

    Args:
        schema: what ``tool_choice`` asks for.

    Raises RequestError naming the field.
    """
    asked: dict[str, dict[str, Any]] = {}
    if schema is not None:
        asked["tool_choice"] = {"json": schema}
    if (value := _of_response_format(response_format)) is not None:
        asked["response_format"] = value
    for name, kind in GUIDED.items():
        if (value := getattr(body, name)) is not None:
            asked[name] = {kind: value}
    if body.structured_outputs is not None:
        asked["structured_outputs"] = _of_structured_outputs(body.structured_outputs)
    if not asked:
        return {}
    if len(asked) > 1:
        first, second, *_ = asked
        raise RequestError(second, f"set, but {first} holds the answer to something already")
    (value,) = asked.values()
    return {"structured_outputs": value}


def is_constrained(body: Body, response_format: Any) -> bool:
    """Whether the body has a field that may hold the answer to something, whatever is in it."""
    return response_format is not None or any(getattr(body, x) is not None for x in (*GUIDED, "structured_outputs"))


def constraint_name(body: Body, response_format: Any, tool_choice: Any = None) -> str:
    """Which field of the body holds the answer to something: what a refusal of ``structured_outputs`` is about."""
    if tool_choice not in (None, "auto", "none"):
        return "tools"
    if response_format is not None:
        return "response_format"
    return next((name for name in GUIDED if getattr(body, name) is not None), "structured_outputs")


def _of_response_format(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        given = value.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) else None
        if not isinstance(schema, dict):
            raise RequestError("response_format.json_schema.schema", f"{schema!r:.80} is not a JSON schema")
        return {"json": schema}
    raise RequestError("response_format.type", f"{kind!r:.80} is not text, json_object or json_schema")


def _of_structured_outputs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError("structured_outputs", f"{value!r:.80} is not an object")
    given = {name: part for name, part in value.items() if part is not None}
    for name in given:
        if name not in KINDS:
            raise RequestError(f"structured_outputs.{name[:80]}", "unknown field")
    if len(given) != 1:
        raise RequestError("structured_outputs", f"has {len(given)} of {', '.join(KINDS)}, one must be given")
    return given
