"""The one exception for a user's mistake: its text is all that the user needs to see."""


class UserError(ValueError):
    """Bad input. The message is one line: what arrived, what was expected, what to do.

    Scripts print it without a traceback and exit with code 2.
    """
