"""Schemas that coerce nothing, and one-line messages on what was expected and what was got."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from fedtri.errors import FedtriError

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
"""Unknown keys and wrong types are errors; nothing is coerced but int to float."""

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_pattern_mismatch": "text that matches {pattern}",
    "bool_type": "true or false",
    "list_type": "a list in [brackets]",
    "dict_type": "a table of keys",
    "model_type": "a table of keys",
    "greater_than_equal": "at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "a number below {lt}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""What a value should have been, by pydantic's name for the mistake."""


def checked_options(function: Callable[..., object], given: Mapping[str, Any], table: str, name: str) -> dict[str, Any]:
    """The options that a configuration's table gives for a function, checked as strictly as any key.

    Raises FedtriError in one line that names table, key and the function's own `name`.
    """
    known = inspect.signature(function, eval_str=True).parameters
    fields: dict[str, Any] = {
        name: (Any if option.annotation is option.empty else option.annotation, option.default)
        for name, option in known.items()
    }
    schema = create_model(name, __config__=STRICT, **fields)
    try:
        return {name: getattr(schema.model_validate(dict(given)), name) for name in given}
    except ValidationError as error:
        key, what = complaint(schema, error)
    raise FedtriError(f"{table}.{key} of {name}: {what}")


def complaint(schema: type[BaseModel], error: ValidationError) -> tuple[str, str]:
    """The first mistake's key, and in one line what was expected and what was found."""
    errors = error.errors()
    first, key = errors[0], _key(schema, errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        return key, _unknown(schema, key)
    if first["type"] == "value_error":
        return key, first["msg"].removeprefix("Value error, ")
    # a key that takes one of two types is complained of once for each
    same = dict.fromkeys(_expected(e) for e in errors if _key(schema, e["loc"]) == key)
    found = first["input"]
    return key, f"expected {' or '.join(same)}, got {str(found).lower() if isinstance(found, bool) else repr(found)}"


def _expected(error: ErrorDetails) -> str:
    template = EXPECTED.get(error["type"])
    what = error["msg"] if template is None else template.format(**error.get("ctx", {}))
    place = error["loc"][-1]
    return f"{what} in place {place + 1}" if isinstance(place, int) else what.replace("False", "false")


def _key(schema: type[BaseModel], place: Sequence[int | str]) -> str:
    """The dotted key of an error's place, without pydantic's names for the members of a union."""
    if not place:
        return ""
    field = schema.model_fields.get(str(place[0]))
    table = None if field is None else field.annotation
    inner = _key(table, place[1:]) if inspect.isclass(table) and issubclass(table, BaseModel) else ""
    return f"{place[0]}.{inner}" if inner else str(place[0])


def _unknown(schema: type[BaseModel], key: str) -> str:
    """Says that there is no such key, and which one may be meant: of its own table first, then of any."""
    names = _names(schema)
    table, _, last = key.rpartition(".")
    siblings = [name for name in names if name.rpartition(".")[0] == table]
    for among in (siblings, names):
        ends = {name.rpartition(".")[2]: name for name in reversed(among)}
        if close := difflib.get_close_matches(last, ends, 1) or [end for end in ends if last and end.startswith(last)]:
            return f"unknown key; did you mean {ends[close[0]]}?"
    return (
        f"unknown key; expected one of {', '.join(siblings)}"
        if siblings
        else "unknown key; there are none; leave it out"
    )


def _names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in schema.model_fields.items():
        table = field.annotation
        names.append(prefix + name)
        if inspect.isclass(table) and issubclass(table, BaseModel):
            names += _names(table, f"{prefix}{name}.")
    return names
