"""half-precision-underflow: a number that was to keep a divisor or an argument from 0 is 0 in float16.

What it does:
    Follows the zero that was divided by, or whose logarithm was taken, back to what made it. The rule holds where a
    clamp held it at a bound that is 0 in its type; where a product or a conversion gave 0 of a number that is not;
    where something was added to a 0 in float16 and it was 0 still; and where the line itself adds a number that is 0
    in the type to what it divides by or takes the logarithm of.

Why it matters:
    float16 ends at 5.96e-8: half of that and less is 0. The eps of 1e-8 that float32 code adds is nothing there.

Example:
    ``x / (x.norm() + 1e-8)`` in float16 at ``x = 0``

Use instead:
    An eps of 1e-4 or more in float16, float32 for the norm, or bfloat16, whose range is that of float32.

Known limits:
    What made a number is known as far as autograd remembers it, and else as far as the line says it in figures: an eps
    in a variable, added where no gradient is wanted, leaves ``division-by-zero`` or ``log-of-nonpositive``. Of a sum,
    what was added is inferred.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand, Producer
from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.nh103_division_by_zero import divisor_of
from nanhunt.rules.offender import at_elements, base_name, is_written_by_user, numbers
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.source_words import lost_in_sum

_HALVES = ("float16", "bfloat16")
_LOGARITHMS = ("log", "log2", "log10")


def _judge(case: Case) -> Judgement | None:
    if not is_written_by_user(case):
        return None
    zero = case.operand("self") if base_name(case) in _LOGARITHMS else divisor_of(case)
    if zero is None or not zero.at_offenders or any(value != 0.0 for value in zero.at_offenders):
        return None
    dtypes = [producer.dtype for producer in zero.made_by]
    reasons = [_reason(producer) if producer.dtype in _HALVES else None for producer in zero.made_by]
    if zero.facts is not None:
        reasons.append(_added_in_line(case, zero.facts.dtype))
        dtypes.append(zero.facts.dtype)
    found = next(((reason, dtype) for reason, dtype in zip(reasons, dtypes, strict=True) if reason is not None), None)
    if found is None:
        return None
    (message, note), dtype = found
    what = "the logarithm was taken of" if base_name(case) in _LOGARITHMS else "the divisor was"
    return Judgement(
        f"{what} {message}, {at_elements(case)}",
        evidence=numbers(case, smallest=LIMITS[dtype].smallest_subnormal),
        notes=(note,) if note else (),
        help=("use an eps that the type can hold, or do this in float32",),
    )


def _added_in_line(case: Case, dtype: str) -> tuple[str, str] | None:
    added = lost_in_sum(case, dtype) if dtype in _HALVES else None
    if added is None:
        return None
    return f"a sum with {added:g}, which is 0 in {dtype}", "inferred: the line adds that number to it"


def _reason(producer: Producer) -> tuple[str, str] | None:
    """Why the producer gave 0, and what of that is inferred."""
    for name, value, stored in producer.numbers:
        if name == "min" and value > 0.0 and stored == 0.0:
            return f"a clamp at {value:g}, which is 0 in {producer.dtype}", ""
        if name == "start" and value == 0.0 and producer.dtype == "float16":
            note = f"inferred: what was added to 0 rounds to 0, as a number below {_rounds_to_zero(producer):.3g} does"
            return "a sum that is 0 in float16, of a 0 and something added to it", note
    if producer.lost is not None and producer.dtype in LIMITS:
        return f"{producer.lost:.6g}, which is 0 in {producer.dtype}", ""
    return None


def _rounds_to_zero(producer: Producer) -> float:
    return LIMITS[producer.dtype].smallest_subnormal / 2


RULE = Rule(
    *("NH405", "half-precision-underflow", "half-precision-underflow", _judge),
    goes_before=("NH103", "NH112", "NH501"),
)


def _divided_by(value: float, *made_by: Producer, op: str = "aten::div", text: str = "") -> Case:
    facts = ValueFacts((4,), "float16", num_posinf=1)
    record = OpRecord(3, op, "birth", "forward", "norm", SourceLine("model.py", 7, text), outputs=(facts,))
    name = "other" if op == "aten::div" else "self"
    operands = (Operand(name, ValueFacts((4,), "float16"), (value,), made_by),)
    return Case(record, OffenderEvidence(1, ((2,),), (math.inf,), operands))


FLAGGED = (
    _divided_by(0.0, Producer("clamp_min", "float16", (("min", 1e-8, 0.0),))),
    _divided_by(0.0, Producer("add", "float16", (("start", 0.0, 0.0),))),
    _divided_by(0.0, Producer("to_copy", "float16", lost=1e-9), op="aten::log"),
    _divided_by(0.0, text="z = h / (n + 1e-8)"),
    _divided_by(0.0, text="return -torch.log(p + 1e-12).mean()", op="aten::log"),
)
CLEAN = (
    _divided_by(0.0),
    _divided_by(0.0, Producer("clamp_min", "float16", (("min", 0.0, 0.0),))),
    _divided_by(1e-4, Producer("clamp_min", "float16", (("min", 1e-8, 0.0),))),
    _divided_by(0.0, Producer("mul", "float32", lost=1e-60)),
    _divided_by(0.0, text="z = h / (n + 1e-4)"),
    _divided_by(0.0, text="z = h / n + g / (n + 1e-8)"),
    _divided_by(0.0, text="return -torch.log(p / (s + 1e-12))", op="aten::log"),
)
