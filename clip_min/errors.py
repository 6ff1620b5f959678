"""The one exception for a user's mistake: its text is all that the user needs to see."""

import difflib
import zipfile

# What the system says where a name is too long, a file unreadable, a text no text: no fault of
# this code, so no traceback.
FROM_OUTSIDE = (OSError, MemoryError, RecursionError, UnicodeError, zipfile.BadZipFile)
LONGEST = 2_000  # characters of a line that is printed; of a longer one both ends


class UserError(ValueError):
    """Bad input. The message is one line: what arrived, what was expected, what to do.

    Scripts print it without a traceback and exit with code 2.
    """


class Note(UserWarning):
    """What a user should know of what was taken for granted; scripts print it as a line."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to a line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def told(error: BaseException) -> str:
    """The one line to print for a `UserError`, or for one of `FROM_OUTSIDE`."""
    if isinstance(error, UserError):
        line = " ".join(str(error).split())  # which may quote a file that holds anything
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}"
    if isinstance(error, MemoryError):
        return f"out of memory ({first_line(error)}); give it less at once, or more memory"
    return f"{type(error).__name__}: {first_line(error)}"


def nearest(what: str, value: str, known) -> str:
    """Look up a name given by a user: `value` if it is known, else an error with the nearest.

    nearest("--method", "zeroshot", METHODS):  --method zeroshot: unknown; did you mean zero_shot?
    """
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {some(known)}"
    raise UserError(f"{what} {value}: unknown; {hint}")


def some(names, most: int = 20) -> str:
    """Names in a row, the first of them where there are many."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
