"""The one exception for a user's mistake. Its message is all that the user sees."""

import difflib
import zipfile

# Errors from outside: a name too long, an unreadable file, bytes that are not text. They are not
# bugs in this code.
FROM_OUTSIDE = (OSError, RecursionError, UnicodeError, zipfile.BadZipFile)
# How PyTorch says that memory is used up, of a GPU and of the machine; both are RuntimeErrors.
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: ")
NO_HOME = "Could not determine home directory"  # pathlib's RuntimeError
LONGEST = 2_000  # characters of a line that is printed; of a longer one both ends


class UserError(ValueError):
    """Bad input. The message is one line: what arrived, what was expected, what to do.

    Scripts print it without a traceback and exit with code 2.
    """


class Note(UserWarning):
    """An assumption the user should know about; scripts print it as one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _out_of_memory(error: BaseException) -> bool:
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def is_bug(error: BaseException) -> bool:
    """Whether an error needs a traceback. Scripts print one line for others, `told(error)`."""
    outside = isinstance(error, (UserError, *FROM_OUTSIDE)) or NO_HOME in str(error)
    return not (outside or _out_of_memory(error))


def told(error: BaseException) -> str:
    """The one line to print for an error that is not a bug."""
    if isinstance(error, UserError):
        line = " ".join(str(error).split())  # which may quote a file that holds anything
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 4 :]}"
    if _out_of_memory(error):
        return f"out of memory ({first_line(error)}); process less at once, or add memory"
    if NO_HOME in str(error):
        return "a path begins with ~NAME, but there is no such user; give the whole path"
    return f"{type(error).__name__}: {first_line(error)}"


def unknown(what: str, value: str, known) -> UserError:
    """The UserError for a name given by a user that is not known, with the nearest known name.

    unknown("--method", "zeroshot", METHODS):  --method zeroshot: unknown; did you mean zero_shot?
    """
    near = difflib.get_close_matches(value, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {some(known)}"
    return UserError(f"{what} {value}: unknown; {hint}")


def some(names, most: int = 20) -> str:
    """The names, joined with commas; only the first `most` of a longer list, and its length."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
