"""The ``nanhunt`` program: its own verbs, and those that installed packages add."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

import typer

from nanhunt.cli import audit, replay, rules, run
from nanhunt.errors import NanhuntError, first_line

GROUP = "nanhunt.commands"

_CANNOT_BE_TESTED = 125

app = typer.Typer(
    name="nanhunt",
    help="Finds the operation that made a PyTorch training step non-finite, and tests its explanation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _load(point: EntryPoint) -> Callable[..., None]:
    """The verb an installed package adds; one that cannot be loaded must not take the other verbs with it."""
    try:
        return point.load()
    except Exception as error:  # noqa: BLE001 - another package's code; the reason is said when the verb is used
        reason = f"{type(error).__name__}: {first_line(error)}"

        def unusable() -> None:
            raise NanhuntError(f"the verb {point.name!r} ({point.value}) cannot be loaded: {reason}")

        unusable.__doc__ = f"Cannot be loaded: {reason}"
        return unusable


app.command("run", context_settings=run.SETTINGS)(run.run)
app.command("replay")(replay.replay)
for _name in ("audit", *(f"audit-{part}" for part in audit.AUDITS)):
    app.command(_name)(audit.verb(_name))
app.command("rules")(rules.rules)
app.command("explain")(rules.explain)
for _point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
    app.command(_point.name)(_load(_point))


def _one_line(text: str) -> str:
    """The text on one line, without what a terminal would obey: names of files and keys come from outside."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def main() -> None:
    """Runs the program; errors of use are one line on standard error and exit code 2.

    With ``--git-bisect`` it is 125 in place of 2, which ``git bisect run`` takes for "cannot be tested".
    """
    try:
        _run()
    except SystemExit as ended:
        # Looked up in the arguments, for a wrong use may be found before this option is.
        if ended.code == NanhuntError.exit_code and "--git-bisect" in sys.argv[2:] and sys.argv[1] != "run":
            ended.code = _CANNOT_BE_TESTED
        raise


def _run() -> None:
    out = sys.stdout
    try:
        try:
            app(prog_name="nanhunt")
        finally:
            # Here, and not at the interpreter's exit, where a reader that has gone would be an error.
            sys.stdout.flush()
            if sys.stdout is not out:
                # typer met the closed pipe first and put a stand-in there; its own exit code 1 would mean a fault.
                raise BrokenPipeError
    except NanhuntError as error:
        if os.environ.get("NANHUNT_DEBUG"):
            raise
        sys.stderr.write(f"nanhunt: {_one_line(error.message)}\n")
        if error.help:
            sys.stderr.write(f"  help: {_one_line(error.help)}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has gone (`nanhunt replay FILE | head`); nothing is left to say to it.
        # The exit code is what a shell reports of a program that a closed pipe ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        sys.exit(128 + 13)


if __name__ == "__main__":
    main()
