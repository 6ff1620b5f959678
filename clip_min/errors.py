"""The one exception for a user's mistake: its text is all that the user needs to see."""

import difflib


class UserError(ValueError):
    """Bad input. The message is one line: what arrived, what was expected, what to do.

    Scripts print it without a traceback and exit with code 2.
    """


class Note(UserWarning):
    """What a user should know of what was taken for granted; scripts print it as a line."""


def nearest(what: str, value: str, known) -> str:
    """Look up a name given by a user: `value` if it is known, else an error with the nearest.

    nearest("--method", "zeroshot", METHODS):  --method zeroshot: unknown; did you mean zero_shot?
    """
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise UserError(f"{what} {value}: unknown; {hint}")
