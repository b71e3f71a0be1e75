"""The exceptions for what a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a file, a field, a model folder, a function's result.

    The message is one line that names the place (file and line, field, shape) and says what was expected.
    The command line prints it and exits with code 2; nothing half-written stays behind.
    """


class StorageError(InputError, OSError):
    """A file could not be written (a full disk, say): what stood there before still does, nothing is half there."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(
            f"{path}: could not be written ({reason}); nothing of it was kept, what stood there still does"
        )
        self.reason = reason


def first_line(error: BaseException) -> str:
    """What an error says, in one line; a heading goes with the line under it."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
