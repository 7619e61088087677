"""``nanhunt rules`` and ``nanhunt explain``: what the rules are. Neither imports torch."""

import sys
from typing import Annotated

import typer

from nanhunt.errors import NanhuntError
from nanhunt.rules.registry import Rule, all_rules


def rules() -> None:
    """Lists the rules: code, name, and the cause each names.

    Example:  nanhunt rules
    """
    for rule in all_rules():
        sys.stdout.write(f"{rule.code}  {rule.name:<32} {rule.cause}\n")


def explain(code: Annotated[str, typer.Argument(help="A code such as NH203, or a rule's name.")]) -> None:
    """Explains one rule: what it looks at, why it matters, what to use instead.

    Example:  nanhunt explain NH203
    """
    sys.stdout.write(page(find_rule(code)) + "\n")


def find_rule(code: str) -> Rule:
    """The rule with this code or name.

    Raises:
        NanhuntError: If there is none.
    """
    for rule in all_rules():
        if code.upper() == rule.code or code == rule.name:
            return rule
    raise NanhuntError(f"no rule {code!r}", help="`nanhunt rules` lists them")


def page(rule: Rule) -> str:
    """The explain page: the docstring of the rule's file under its code."""
    return f"{rule.code} {(sys.modules[rule.judge.__module__].__doc__ or '').strip()}"
