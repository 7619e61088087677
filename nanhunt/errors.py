"""Errors that end in one line for the user: what is wrong, and what to do."""


class NanhuntError(Exception):
    """Something outside nanhunt is wrong: a file, a target, an option.

    Attributes:
        message: What is wrong, lower case, without a full stop.
        help: What to do about it; empty where the message says it all.
        exit_code: Exit status of the command line.
    """

    exit_code = 2
    help = ""

    def __init__(self, message: str, *, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        if help:
            self.help = help

    def __str__(self) -> str:
        return f"{self.message}; {self.help}" if self.help else self.message


class CaptureError(NanhuntError):
    """A capture file cannot be read or written."""


class TargetError(NanhuntError):
    """What is to be debugged cannot be found or built."""


class NonFiniteStep(NanhuntError):
    """A training step went non-finite and was stopped before the optimizer could move the weights.

    Attributes:
        capture: Path of the saved step, or None if it could not be saved.
        step: Optimizer step, from 0.
        module_message: Where the module tracer saw it first; empty if it did not run.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, step: int, capture: str | None = None, module_message: str = "", help: str = ""
    ) -> None:
        super().__init__(message, help=help)
        self.step = step
        self.capture = capture
        self.module_message = module_message


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
