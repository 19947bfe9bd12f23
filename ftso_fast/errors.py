"""What can go wrong through a caller, its data, or the numbers; all else keeps Python's own exceptions."""


class UsageError(ValueError):
    """The call is wrong: an unknown mode, operator, backend, cell or option (the CLI's exit code 2)."""


class DataError(ValueError):
    """The data or a file is bad: unreadable, out of range, ragged, empty (the CLI's exit code 3)."""


class NumericalError(ArithmeticError):
    """A loss or a gradient is not finite (the CLI's exit code 5)."""
