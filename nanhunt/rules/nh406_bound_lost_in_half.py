"""bound-lost-in-half: a clamp below 1 that rounds to 1 in its type.

What it does:
    Follows the argument of a logarithm, an inverse hyperbolic tangent or a logit back to the clamp that held it. The
    rule holds where the bound was written below 1 in magnitude, the type of the tensor stores it as exactly 1, and the
    value lay at that bound.

Why it matters:
    The numbers just below 1 are 0.0005 apart in float16 and 0.004 in bfloat16. ``1 - 1e-6`` is 1 in both, and the clamp
    that was to keep ``log(1 - p)`` finite does nothing.

Example:
    ``torch.log(1 - p.clamp(1e-6, 1 - 1e-6))`` in bfloat16

Use instead:
    ``logsigmoid`` or ``softplus`` on the logits, in float32.

Known limits:
    What made a number is known as far as autograd remembers it.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand, Producer
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import at_elements, base_name, is_written_by_user, numbers
from nanhunt.rules.registry import Case, Judgement, Rule

_EDGES = {"log": 0.0, "log2": 0.0, "log10": 0.0, "log1p": -1.0, "atanh": 1.0, "logit": 1.0, "erfinv": 1.0}


def _judge(case: Case) -> Judgement | None:
    name = base_name(case)
    argument = case.operand("self")
    if name not in _EDGES or argument is None or not argument.at_offenders or not is_written_by_user(case):
        return None
    if any(abs(value) != abs(_EDGES[name]) for value in argument.at_offenders):
        return None
    for producer in argument.made_by:
        for bound, value, stored in producer.numbers:
            is_half = producer.dtype in ("float16", "bfloat16")
            if is_half and bound in ("min", "max") and abs(value) < 1.0 and abs(stored) == 1.0:
                return Judgement(
                    f"{name} of a number held by a clamp at {value:.9g}, which is {stored:g} in {producer.dtype},"
                    f" {at_elements(case)}",
                    evidence=numbers(case, bound=value, bound_as_stored=stored),
                    help=("work on the logits in float32, where no bound is needed",),
                )
    return None


RULE = Rule("NH406", "bound-lost-in-half", "bound-lost-in-half", _judge, goes_before=("NH111", "NH405", "NH501"))


def _log_of(value: float, *made_by: Producer) -> Case:
    facts = ValueFacts((4,), "bfloat16", num_neginf=1)
    record = OpRecord(3, "aten::log", "birth", "forward", "", None, outputs=(facts,))
    operands = (Operand("self", ValueFacts((4,), "bfloat16"), (value,), made_by),)
    return Case(record, OffenderEvidence(1, ((2,),), (-math.inf,), operands))


_RSUB = Producer("rsub", "bfloat16", of=("clamp",))
FLAGGED = (_log_of(0.0, _RSUB, Producer("clamp", "bfloat16", (("max", 0.999999, 1.0),))),)
CLEAN = (
    _log_of(0.0),
    _log_of(0.0, _RSUB, Producer("clamp", "bfloat16", (("max", 1.0, 1.0),))),
    _log_of(0.0, _RSUB, Producer("clamp", "float32", (("max", 0.999999, 0.9999989867210388),))),
    _log_of(0.0, _RSUB, Producer("clamp", "float32", (("max", 0.999999999, 1.0),))),
)
