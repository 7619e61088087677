"""``nanhunt rules`` and ``nanhunt explain``: what the rules are. Neither imports torch."""

import json
import sys
from typing import Annotated, Any

import typer

from nanhunt.rules.pages import find_rule, page, parts
from nanhunt.rules.registry import Rule, find_rules

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def rules(as_json: _AsJson = False) -> None:
    """Lists the rules: code, status, name, and what it says when it applies.

    Examples:
      nanhunt rules

      nanhunt rules --json
    """
    found = find_rules()
    if as_json:
        sys.stdout.write(json.dumps([_fields(rule) for rule in found.rules], indent=2) + "\n")
    else:
        for rule in found.rules:
            sys.stdout.write(f"{rule.code}  {rule.name:<34} {rule.severity:<8} {rule.status}\n")
    for skip in found.unusable:
        sys.stderr.write(f"nanhunt: {skip.what} cannot be used: {skip.reason}\n")


def explain(
    code: Annotated[str, typer.Argument(help="A code such as NH203, or a rule's name.", show_default=False)],
    as_json: _AsJson = False,
) -> None:
    """Explains one rule: what it looks at, why it matters, what to use instead.

    Examples:
      nanhunt explain NH203

      nanhunt explain log-of-nonpositive --json
    """
    rule = find_rule(code)
    if not as_json:
        sys.stdout.write(page(rule) + "\n")
        return
    text = parts(rule)
    fields = {**_fields(rule), "summary": text.summary, "sections": dict(text.sections)}
    sys.stdout.write(json.dumps(fields, indent=2) + "\n")


def _fields(rule: Rule) -> dict[str, Any]:
    return {
        "code": rule.code,
        "name": rule.name,
        "cause": rule.cause,
        "severity": rule.severity,
        "status": rule.status,
        "judges": rule.judges.__name__,
        "module": rule.module,
    }
