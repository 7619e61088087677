"""zero-times-infinity: NaN was made of a product of zero and infinity.

What it does:
    Holds where a product made NaN of inputs without NaN, which it does of 0 and infinity alone; in a product of
    matrices, where such a pair is among the terms of every NaN that was looked at.

Why it matters:
    A mask that multiplies does not take an infinity away: 0 times -inf is NaN.

Example:
    ``(1 - keep) * float("-inf")``, or ``log_probabilities * one_hot`` where a log-probability is -inf

Use instead:
    ``masked_fill`` or ``where``, which put a value in the place of another and do not compute with it.
"""

import math

from nanhunt.records.evidence import Exact, OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    at_nan,
    base_name,
    has_infinite_input,
    has_nan_input,
    is_written_by_user,
    numbers,
    where_infinity_came_from,
)
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    if not is_written_by_user(case) or has_nan_input(case) or not has_infinite_input(case):
        return None
    assert case.op is not None
    assert case.evidence is not None
    num_nan, terms = case.op.outputs[0].num_nan, case.evidence.exact
    in_sums = [one for one, result in zip(terms, case.evidence.results, strict=False) if math.isnan(result)]
    is_in_sums = bool(in_sums) and all(one.num_zero_times_infinity for one in in_sums)
    if not num_nan or (base_name(case) != "mul" and not is_in_sums):
        return None
    return Judgement(
        f"{case.op.op} of 0 and infinity: {at_nan(case)}",
        evidence=numbers(case, num_nan=num_nan),
        notes=where_infinity_came_from(case),
        help=("use where or masked_fill, which put a value there instead of multiplying with 0",),
    )


RULE = Rule("NH113", "zero-times-infinity", "zero-times-infinity", _judge)

_MASK = ValueFacts((4,), "float32", num_neginf=1)


def _product(op: str, facts: ValueFacts, *terms: Exact) -> Case:
    output = ValueFacts((4,), "float32", num_nan=1)
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(output,), ingredients=(1,))
    operands = (Operand("self", facts, (-math.inf,)), Operand("other", ValueFacts((4,), "float32"), (0.0,)))
    return Case(record, OffenderEvidence(1, ((2,),), (math.nan,), operands, exact=terms))


FLAGGED = (_product("aten::mul", _MASK), _product("aten::bmm", _MASK, Exact(math.nan, math.nan, 1, 0)))
CLEAN = (
    _product("aten::sub", _MASK),
    _product("aten::mul", ValueFacts((4,), "float32", num_nan=1)),
    _product("aten::bmm", _MASK, Exact(math.nan, math.nan, 0, 2)),
)
