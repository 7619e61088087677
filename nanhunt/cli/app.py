"""The ``nanhunt`` program: its own verbs, and those that installed packages add."""

import os
import sys
from importlib.metadata import entry_points

import typer
from rich.console import Console

from nanhunt.cli import replay, rules
from nanhunt.errors import NanhuntError

GROUP = "nanhunt.commands"

app = typer.Typer(
    name="nanhunt",
    help="Finds the operation that made a PyTorch training step non-finite, and tests its explanation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command("replay")(replay.replay)
app.command("rules")(rules.rules)
app.command("explain")(rules.explain)
for _point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
    app.command(_point.name)(_point.load())


def main() -> None:
    """Runs the program; errors of use are one line on standard error and exit code 2."""
    try:
        app()
    except NanhuntError as error:
        if os.environ.get("NANHUNT_DEBUG"):
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"nanhunt: {error.message}", markup=False)
        if error.help:
            console.print(f"  help: {error.help}", markup=False)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has gone (`nanhunt replay FILE | head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
