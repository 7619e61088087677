"""non-finite-from-another-rank: a collective brought NaN or infinity into this process.

What it does:
    Names the collective whose result was non-finite although this process had put in finite values only: the all-reduce
    of DistributedDataParallel, the reduce-scatter and all-gather of FSDP, a broadcast, or one of the loop's own.

Why it matters:
    A collective smears the fault of one rank over all: here every operation is innocent.

Use instead:
    Look at the rank where it began. The report names it if every rank runs its loop under ``nanhunt.trace`` and asks
    for its report before the process group is destroyed.

Known limits:
    A collective that runs while this rank's own contribution is non-finite counts as this rank's fault.
"""

from nanhunt.records.ops import StateSource, ValueFacts
from nanhunt.rules.nh101_non_finite_activation import describe
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    source = case.offender
    if not isinstance(source, StateSource) or source.kind != "collective":
        return None
    return Judgement(
        f"{source.op or 'a collective'} brought {describe(source.facts)} from another rank",
        evidence={"num_nonfinite": source.facts.num_nonfinite, "first_position": list(source.first_index)},
        notes=("what this rank put in was finite",),
        help=("trace every rank: the report then names the one where it began",),
    )


RULE = Rule("NH207", "non-finite-from-another-rank", "non-finite-from-another-rank", _judge)

_FACTS = ValueFacts((58,), "float32", num_nan=58)
FLAGGED = (Case(StateSource(-1, "collective", "", _FACTS, (0,), op="c10d::allreduce_", phase="backward")),)
CLEAN = (Case(StateSource(-1, "parameter", "head.weight", _FACTS, (0,))),)
