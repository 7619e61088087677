"""normalised-constant: a norm without a working eps was given values that are all alike.

What it does:
    Looks at the eps of a layer, group or batch norm. The rule holds where it is 0 and the result of finite inputs of
    ordinary size is not finite, which takes a variance of 0.

Why it matters:
    The norm multiplies the deviations, all 0, with 1 / sqrt(0): NaN for a constant window, a dead channel, a row of
    padding.

Use instead:
    An eps above 0, as the layers of torch have by default.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    at_elements,
    base_name,
    has_infinite_input,
    has_nan_input,
    is_written_by_user,
    numbers,
    values_of,
)
from nanhunt.rules.registry import Case, Judgement, Rule

_NORMS = ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm")


def _judge(case: Case) -> Judgement | None:
    eps, given = values_of(case, "eps"), case.operand("input")
    if base_name(case) not in _NORMS or not is_written_by_user(case) or has_nan_input(case) or has_infinite_input(case):
        return None
    if not eps or eps[0] > LIMITS["float32"].smallest_subnormal or given is None or given.facts is None:
        return None
    assert case.op is not None
    limits, largest = LIMITS.get(given.facts.dtype), given.facts.abs_max
    if largest is None or limits is None or 4 * largest * largest * given.facts.num_elements > LIMITS["float32"].max:
        return None
    if any(value != 0.0 for value in values_of(case, "running_var")):
        return None
    return Judgement(
        f"{case.op.op} with an eps of {eps[0]:g} divided by a deviation of 0 {at_elements(case)}",
        evidence=numbers(case, eps=eps[0], variance=0.0),
        help=("give the norm an eps above 0",),
    )


RULE = Rule("NH118", "normalised-constant", "normalised-constant", _judge)


def _norm(eps: float, largest: float = 1.0) -> Case:
    output = ValueFacts((2, 4), "float32", num_nan=4)
    record = OpRecord(5, "aten::native_layer_norm", "birth", "forward", "norm", None, outputs=(output,))
    operands = (
        Operand("input", ValueFacts((2, 4), "float32", abs_max=largest), (largest,)),
        Operand("eps", None, (eps,)),
    )
    return Case(record, OffenderEvidence(4, ((1, 0),), (math.nan,), operands))


FLAGGED = (_norm(0.0), _norm(0.0, 3.0))
CLEAN = (_norm(1e-5), _norm(0.0, 1e30))
