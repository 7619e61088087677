"""exp-overflow: the exponential of a number above the logarithm of the largest one was taken.

What it does:
    Looks at the argument of ``exp``, ``exp2``, ``expm1``, ``sinh`` and ``cosh`` at the offending elements. The rule
    holds only if all of them lie beyond the point where the result leaves its type: 88.7 for ``exp`` in float32 and
    bfloat16, 11.09 in float16, 709.8 in float64.

Why it matters:
    exp doubles with every 0.69 of its argument; an infinity in a sum or a quotient is NaN one operation later.

Example:
    ``torch.exp(torch.tensor(89.0))``

Use instead:
    ``softmax``, ``logsumexp`` or ``softplus``, which subtract the maximum first; a bound on a log-variance or a
    learned temperature where it is made.

Known limits:
    Of an operation in place the argument is gone; the infinite result says that it was too large.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    EXPONENTIALS,
    NARROW,
    WRITTEN_OVER,
    at_elements,
    base_name,
    digits_apart,
    has_infinite_input,
    has_nan_input,
    is_in_place,
    is_written_by_user,
    numbers,
    quoted,
    values_of,
)
from nanhunt.rules.registry import Case, Judgement, Rule


def _judge(case: Case) -> Judgement | None:
    name = base_name(case)
    if name not in EXPONENTIALS or not is_written_by_user(case) or has_nan_input(case) or has_infinite_input(case):
        return None
    assert case.op is not None
    assert case.evidence is not None
    dtype = case.op.outputs[0].dtype
    if dtype not in LIMITS:
        return None
    edge = _edge(name, LIMITS[dtype].max)
    arguments, limit = values_of(case, "self"), f"{dtype} holds {name} {_until(edge)}"
    if is_in_place(case) and all(math.isinf(result) for result in case.evidence.results):
        message = f"{name} of a number that is too large {at_elements(case)}; {limit}"
        return Judgement(message, numbers(case, limit=edge), (WRITTEN_OVER,), _HELP)
    # Rounding may let the last number below the edge overflow as well.
    sized = [abs(value) if name in ("sinh", "cosh") else value for value in arguments]
    if not sized or any(value < edge * (1 - LIMITS[dtype].eps) for value in sized):
        return None
    wide = _edge(name, LIMITS["float32"].max)
    notes = (f"float32 holds {name} {_until(wide)}",) if dtype in NARROW and max(sized) <= wide else ()
    evidence = numbers(case, largest_argument=max(sized), limit=edge)
    digits = digits_apart(arguments[0], edge)
    up_to = "up to " if len(set(arguments)) == 1 < case.evidence.num_offending else ""
    of = f"{up_to}{quoted(case, arguments, digits=digits)}"
    return Judgement(f"{name} of {of}; {dtype} holds {name} {_until(edge, digits)}", evidence, notes, _HELP)


_HELP = ("subtract the maximum first, as softmax and logsumexp do, or bound the argument where it is made",)


def _until(edge: float, digits: int = 6) -> str:
    """``up to 88.7228``, or ``below 128`` where the edge was rounded up."""
    text = f"{edge:.{digits}g}"
    return f"{'up to' if float(text) <= edge else 'below'} {text}"


def _edge(name: str, largest: float) -> float:
    if name == "exp2":
        return math.log2(largest)
    return math.log(largest) + (math.log(2) if name in ("sinh", "cosh") else 0.0)


RULE = Rule("NH107", "exp-overflow", "exp-overflow", _judge)


def _exp_of(value: float, dtype: str = "float32", op: str = "aten::exp") -> Case:
    facts = ValueFacts((4,), dtype, num_posinf=1)
    record = OpRecord(3, op, "birth", "forward", "head", None, outputs=(facts,))
    operands = () if op.endswith("_") else (Operand("self", ValueFacts((4,), dtype, abs_max=value), (value,)),)
    return Case(record, OffenderEvidence(1, ((2,),), (math.inf,), operands))


FLAGGED = (_exp_of(89.0), _exp_of(12.0, "float16"), _exp_of(0.0, op="aten::exp_"), _exp_of(90.0, op="aten::cosh"))
CLEAN = (_exp_of(80.0), _exp_of(89.0, "float64"), _exp_of(89.0, op="aten::mul"))
