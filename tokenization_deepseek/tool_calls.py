"""One tool call as generations write it, taken apart: name and arguments, or the reason why that can't be done."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = re.compile(r"(?P<name>[^\n]*)\n```json\n(?P<arguments>.*)\n```\s*", re.DOTALL)
_INVOKE = re.compile(r'name="(?P<name>[^"]*)">\n?(?P<body>.*)', re.DOTALL)


# Python's types of what a schema calls so; a bool is an int too, and none here.
_TYPES: dict[Any, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


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
    """The value that a text stands for, if that is of the schema's type; else the text."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if not isinstance(value, str) or not isinstance(kind, str) or kind not in _TYPES:
        return value
    try:
        found = read_json(value)
    except ValueError:
        return value
    return found if type(found) in _TYPES[kind] else value


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
        return read_json(text)
    except ValueError as error:
        what = "the arguments are" if name is None else f"parameter {name!r} is"
        raise InvalidCall(f"{what} no JSON ({error})") from None


def read_json(text: str) -> Any:
    """The value that a text of JSON says.

    Raises:
        ValueError: for what is none, NaN among it; for a key that is there twice, of which one would be lost; for
            more lists in one another than Python reads, as a model writes that repeats itself.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too many lists and objects in one another") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is none of JSON's numbers")
