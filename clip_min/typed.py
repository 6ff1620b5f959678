"""Check values from outside against type hints.

    expect(value, dict[str, int], "plan.json", "quotas")
    UserError: plan.json: quotas.rose is 'many', expected a whole number

A kind is a type hint: float (any finite number), int, str, bool, None, list[…], dict[str, …],
A | B, Literal[…], Annotated[…]; or a dictionary {key: kind}, for an object with these keys and any
others beside them.
"""

import reprlib
import types
import typing
from dataclasses import fields

from clip_min.errors import UserError

WORDS = {
    float: "a finite number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def expect(value, kind, where: str, key: str = "") -> None:
    """UserError, naming the file `where` and the `key` in it, unless `value` is of this kind."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    outer = dict if isinstance(kind, dict) else origin if origin in (list, dict) else kind
    if origin is typing.Annotated:
        return expect(value, inner[0], where, key)
    if not _fits(value, outer):
        at = f"{where}: {key} is" if key else f"{where}: is"
        odd = " without \\0 and half characters" if isinstance(value, str) and outer is str else ""
        raise UserError(f"{at} {_SHORT.repr(value)}, expected {words(outer)}{odd}")
    dot = "." if key else ""
    if isinstance(kind, dict):
        for name, part in kind.items():
            if name not in value:
                raise UserError(f"{where}: {key}{dot}{name} is missing")
            expect(value[name], part, where, f"{key}{dot}{name}")
    elif origin in (list, dict):
        for name, item in enumerate(value) if origin is list else value.items():
            expect(item, inner[-1], where, f"{key}{dot}{name}")


def expect_fields(settings) -> None:
    """UserError, naming the flag, unless every field of this dataclass is of its kind."""
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value, kind = getattr(settings, field.name), hints[field.name]
        if not _fits(value, kind):
            flag = f"--{field.name.replace('_', '-')}"
            shown = value if isinstance(value, str | float) else _SHORT.repr(value)
            raise UserError(f"{flag} {shown}: expected {words(kind)}")


def words(kind) -> str:
    """A kind in plain words: "text or null"."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, inner))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {words(inner[0])}"
    return " or ".join(map(words, inner)) if inner else WORDS.get(kind, str(kind))


def _fits(value, kind) -> bool:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if typing.get_origin(kind) is tuple:  # tuple[str, ...]
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 3e38  # float32's range; NaN is not <
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is str and isinstance(
        value, str
    ):  # half a surrogate pair can be neither shown nor kept
        return "\0" not in value and value.encode(errors="ignore").decode() == value
    return isinstance(value, kind)
