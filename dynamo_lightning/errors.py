"""The errors that the command line prints in one line; any other exception is our fault and shows its traceback."""


class UserError(ValueError):
    """A setting, file or combination that cannot work; the message names the option, the numbers and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file, folder or checkpoint that an option names does not exist."""

    def __str__(self) -> str:
        """The message alone: `OSError` would look for an error number."""
        return str(self.args[0]) if self.args else ""


class RunError(RuntimeError):
    """A run that cannot go on, through no mistake in its options; the message says what was kept and what to do."""


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The user's mistake that led to an exception: jsonargparse wraps those of a callback's constructor."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
