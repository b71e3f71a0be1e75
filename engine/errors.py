"""The exceptions for what a user can mend."""


class InputError(ValueError):
    """Bad input from outside: a file, a field, a model folder, a function's result.

    The message is one line that names the place (file and line, field, shape) and says what was expected.
    The command line prints it and exits with code 2; nothing half-written stays behind.
    """


class StorageError(InputError, OSError):
    """A file could not be written (a full disk, say): what stood there before still does, nothing is half there."""
