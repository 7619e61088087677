"""non-finite-state: a weight, buffer or optimizer moment was NaN or infinite before the step began.

What it does:
    Looks at parameters, buffers and optimizer state before the forward pass, and at memory and constants at their
    first use.

Why it matters:
    The step is only where it shows: it came from an earlier one or a checkpoint, and this batch is innocent.

Use instead:
    Capture the step that wrote it: run under ``nanhunt.watch`` from a healthy checkpoint.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement, Rule

_STATE = ("parameter", "buffer", "module attribute", "optimizer state", "constant", "uninitialised memory")


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind not in _STATE:
        return None
    what = f"{source.kind} {source.name}".strip()
    evidence = {"num_nonfinite": source.facts.num_nonfinite, "first_position": list(source.first_index)}
    others = sum(1 for other in case.trace.sources if other.kind == source.kind) - 1
    more = (f"{others:,} more of kind {source.kind} are non-finite",) if others > 0 else ()
    if source.kind in ("constant", "uninitialised memory"):
        found = "no operation of the step wrote it: it was made before the step, or holds whatever the memory held"
        return Judgement(
            f"{what} holds {describe(source.facts)} at its first use", evidence=evidence, notes=(found, *more)
        )
    return Judgement(
        f"{what} holds {describe(source.facts)} before the step",
        evidence=evidence,
        notes=("it was there before this step: an earlier one wrote it, or it came with a checkpoint", *more),
        help=("run under nanhunt.watch from a checkpoint that is still finite",),
    )


RULE = Rule("NH701", "non-finite-state", "non-finite-state", _judge)

_FACTS = ValueFacts((2, 3), "float32", num_nan=1)
FLAGGED = (Case(StateSource(-1, "parameter", "head.weight", _FACTS, (1, 2))),)
CLEAN = (Case(StateSource(-1, "batch", "batch.windows", _FACTS, (1, 2))),)
