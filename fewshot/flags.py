"""Command-line flags from settings: each field of a dataclass is a flag, its annotation the help.

lr: Annotated[float, "peak learning rate"] = 2e-4     ->     --lr FLOAT  peak learning rate [0.0002]
"""

import argparse
import difflib
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields

from clip_min import UserError
from clip_min.errors import unknown


class Parser(argparse.ArgumentParser):
    """argparse with our errors: one line that names the nearest valid flag."""

    __init__ = functools.partialmethod(
        argparse.ArgumentParser.__init__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def error(self, message: str):
        raise UserError(message)

    def parse(self, argv: list[str]) -> dict:
        """-> the given flags, by field name; an unknown flag is an error."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            # Compare without dashes, which all flags share: --name would resemble --augment.
            known = [f[2:] for f in self._option_string_actions if f.startswith("--")]
            near = difflib.get_close_matches(flag[2:], known, 1) if flag.startswith("--") else []
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UserError(f"unknown argument {flag}; {hint}")
        return {key: value for key, value in vars(found).items() if value is not None}


def add_flags(group, settings: type, shown: dict | None = None, only: Sequence | None = None):
    """Add an optional flag for each field of the dataclass `settings`, or only for these.

    A flag that is not given is absent from the result of `Parser.parse`, so that a recipe can set
    it. `shown`: defaults to print, if they differ from the dataclass's.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in (f for f in fields(settings) if only is None or f.name in only):
        kind, help = typing.get_args(hints[field.name])
        default = (shown or {}).get(field.name, field.default)
        options = {
            "help": help
            + ("" if default is False or default in ("", (), None) else f" [{default}]")
        }
        if typing.get_origin(kind) is typing.Literal:
            options |= {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:  # one text, which the settings split
            options |= {"metavar": "TEXTS"}
        elif dict in typing.get_args(kind):  # a file name; the settings read the file
            options |= {"metavar": "FILE"}
        elif kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            name = "INT" if kind == int | str else kind.__name__.upper()
            options |= {"type": number_or_word if kind == int | str else kind, "metavar": name}
        options["help"] = options["help"].replace("%", "%%")
        group.add_argument(f"--{field.name.replace('_', '-')}", default=None, **options)


def number_or_word(text: str) -> int | str:
    """The type of a flag: "4" -> 4, "all" -> "all"."""
    try:
        return int(text)
    except ValueError:
        return text


def pick(settings: type, given: dict) -> dict:
    """The entries of `given` that are fields of `settings`."""
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in given.items() if name in names}


def listed(flag: str, text: str, known: dict, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that a flag gives: "dtd" is one, "dtd,eurosat" two, and a group all that it has."""
    parts = [part.strip() for part in text.split(",")]
    names = [name for part in parts for name in groups.get(part, (part,))]
    for name in names:
        if name not in known:
            raise unknown(flag, name, [*known, *groups])
    return list(dict.fromkeys(names))


def changes(settings, usual) -> str:
    """The settings that differ from the usual ones, in one line: "lr 0.0002, epochs 15"."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    differ = {name: value for name, value in values.items() if value != getattr(usual, name)}
    for name, value in differ.items():
        differ[name] = f"of {len(value)} classes" if isinstance(value, dict) else value
    return ", ".join(f"{name} {value or repr(value)}" for name, value in differ.items())
