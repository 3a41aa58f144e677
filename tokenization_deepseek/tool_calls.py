"""One tool call as generations write it, taken apart: name and arguments, or the reason why that can't be done."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = re.compile(r"(?P<name>[^\n]*)\n```json\n(?P<arguments>.*)\n```\s*", re.DOTALL)
_INVOKE = re.compile(r'name="(?P<name>[^"]*)">\n?(?P<body>.*)', re.DOTALL)


class InvalidCall(ValueError):
    """A tool call that can't be read; the message says why."""


def bare_call(text: str) -> dict[str, Any]:
    """V3.1: name, separator, arguments."""
    name, separator, arguments = text.partition(_SEPARATOR)
    if not separator:
        raise InvalidCall(f"no {_SEPARATOR} between name and arguments")
    return _call(name, _object(arguments))


def fenced_call(text: str) -> dict[str, Any]:
    """V2.5 to R1: type, separator, name, and arguments in a json fence."""
    kind, separator, rest = text.partition(_SEPARATOR)
    found = _FENCE.fullmatch(rest)
    if not separator or found is None:
        raise InvalidCall(f"not of the form type{_SEPARATOR}name, then arguments between ```json and ```")
    return _call(found["name"], _object(found["arguments"]), kind)


def dsml_call(parameter: str) -> Callable[[str], dict[str, Any]]:
    """V3.2 and later: parameters in tags of this name, or one JSON object in their place."""
    opening = rf'<｜DSML｜{parameter} name="(?P<name>[^"]*)" string="(?P<string>true|false)">'
    tag = re.compile(rf"{opening}(?P<value>.*?)</｜DSML｜{parameter}>\s*", re.DOTALL)

    def read(text: str) -> dict[str, Any]:
        invoke = _INVOKE.fullmatch(text)
        if invoke is None:
            raise InvalidCall('no name="..." behind the opening of the call')
        body = invoke["body"].strip()
        if body.startswith("{"):
            return _call(invoke["name"], _object(body))
        arguments: dict[str, Any] = {}
        for found in tag.finditer(body):
            if found["name"] in arguments:
                raise InvalidCall(f"parameter {found['name']!r} is given twice")
            is_text = found["string"] == "true"
            arguments[found["name"]] = found["value"] if is_text else _json(found["value"], found["name"])
        if left := tag.sub("", body).strip():
            raise InvalidCall(f"not a parameter: {left[:80]!r}")
        return _call(invoke["name"], arguments)

    return read


def cast(call: dict[str, Any], tools: Sequence[Any] | None) -> dict[str, Any]:
    """The call with texts that stand for a number, a truth value, a list or an object read by its tool's schema."""
    arguments = call["function"]["arguments"]
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        properties = (function.get("parameters") or {}).get("properties") or {}
        if function.get("name") == call["function"]["name"]:
            arguments |= {
                name: _by_schema(arguments[name], properties[name]) for name in arguments if name in properties
            }
    return call


def _by_schema(value: Any, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if not isinstance(value, str) or kind not in ("integer", "number", "boolean", "array", "object"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _call(name: str, arguments: dict[str, Any], kind: str = "function") -> dict[str, Any]:
    if not name.strip():
        raise InvalidCall("the call has no name")
    return {"type": kind, "function": {"name": name, "arguments": arguments}}


def _object(text: str) -> dict[str, Any]:
    arguments = _json(text, None) if text.strip() else {}
    if not isinstance(arguments, dict):
        raise InvalidCall(f"the arguments are no JSON object but {type(arguments).__name__}")
    return arguments


def _json(text: str, name: str | None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        what = "the arguments are" if name is None else f"parameter {name!r} is"
        raise InvalidCall(f"{what} no JSON ({error})") from None
