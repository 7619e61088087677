"""cast-overflow: finite numbers were converted to a type that ends below them.

What it does:
    Looks at the source of a conversion at the offending elements. It holds where all of them are finite and beyond the
    largest number of the type they were converted to.

Why it matters:
    ``float64`` from a file holds 1e300, ``float32`` ends at 3.4e38 and ``float16`` at 65504. The conversion is often
    the last step of reading data, and nothing is raised.

Use instead:
    Scale the values before the conversion, or look at what they are: fill values such as 9.97e36 and 1e300 stand for
    missing data.

Known limits:
    A conversion that ran before the trace began, as in the worker of a loader, leaves infinities only.
"""

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.registry import Case, Judgement, Rule

_SOURCES = {"_to_copy": "self", "to": "self", "copy_": "src"}


def _judge(case: Case) -> Judgement | None:
    op = case.op
    given = case.operand(_SOURCES.get(op.op.removeprefix("aten::"), "")) if op is not None else None
    if op is None or op.phase != "forward" or given is None or given.facts is None:
        return None
    if not op.outputs or op.outputs[0].dtype not in LIMITS:
        return None
    made, limit = op.outputs[0].dtype, LIMITS[op.outputs[0].dtype].max
    values = given.at_offenders
    if not values or not all(limit < abs(value) < float("inf") for value in values):
        return None
    assert case.evidence is not None
    where = list(case.evidence.positions[0])
    return Judgement(
        f"{count(case.evidence.num_offending, 'finite number')} of {given.facts.dtype} lost to {made}, which ends at"
        f" {limit:.3g}: first {values[0]:.3g} at {where}",
        evidence={"value": values[0], "limit": limit, "first_position": where, "from": given.facts.dtype, "to": made},
        help=("look at what these values are; scale them before the conversion",),
    )


RULE = Rule("NH604", "cast-overflow", "cast-overflow", _judge, goes_before=("NH108",))


def _cast(value: float, given: str = "float64", made: str = "float32", op: str = "aten::_to_copy") -> Case:
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(ValueFacts((8, 4), made, num_posinf=1),))
    operand = Operand("src" if op == "aten::copy_" else "self", ValueFacts((8, 4), given, abs_max=value), (value,))
    return Case(record, OffenderEvidence(1, ((5, 2),), (float("inf"),), (operand,)))


FLAGGED = (_cast(1e300), _cast(-1e300, op="aten::copy_"))
CLEAN = (_cast(float("inf")), _cast(1e30), _cast(1e300, op="aten::mul"))
