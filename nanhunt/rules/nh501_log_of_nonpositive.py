"""log-of-nonpositive: the logarithm of zero or of a negative number was taken.

What it does:
    Looks at the argument of ``log``, ``log2``, ``log10`` and ``log1p`` at the offending elements. The rule holds only
    if all of them lie at or below the edge of the domain. Of an operation in place the argument is gone; -inf says
    that it was on the edge, NaN that it was below.

Why it matters:
    log(0) is -inf and log of a negative number is NaN; in a loss that is the end of the step.

Use instead:
    ``logsigmoid``, ``log_softmax`` or ``softplus`` on the logits, which never form the number whose logarithm is
    wanted.
"""

import math

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import WRITTEN_OVER, at_elements, base_name, is_in_place, numbers
from nanhunt.rules.registry import Case, Judgement, Rule

_EDGES = {"log": 0.0, "log2": 0.0, "log10": 0.0, "log1p": -1.0}


def _judge(case: Case) -> Judgement | None:
    if case.op is None or (case.op.phase == "backward" and case.op.own_backward is None):
        # The backward pass of a power takes a logarithm that the user never wrote.
        return None
    name = base_name(case)
    if name in _EDGES and is_in_place(case):
        return _judge_in_place(case, name)
    argument = case.operand("self")
    if name not in _EDGES or argument is None or not argument.at_offenders:
        return None
    edge = _EDGES[name]
    if any(value > edge for value in argument.at_offenders):
        return None
    assert case.evidence is not None
    lowest, where = min(argument.at_offenders) + 0.0, list(case.evidence.positions[0])
    return Judgement(
        f"{name} of {lowest:.6g} at {count(case.evidence.num_offending, 'element')}, first at {where}",
        evidence={"num_offending": case.evidence.num_offending, "first_position": where, "lowest_argument": lowest},
        notes=_notes(argument),
        help=_HELP,
    )


_HELP = ("work on the logits: logsigmoid, log_softmax or softplus do not form the argument at all",)


def _judge_in_place(case: Case, name: str) -> Judgement | None:
    assert case.evidence is not None
    results = case.evidence.results
    if not results or any(result == math.inf for result in results):
        return None
    what = f"{_EDGES[name]:g}" if results[0] == -math.inf else f"a number below {_EDGES[name]:g}"
    return Judgement(f"{name} of {what} {at_elements(case)}", numbers(case), (WRITTEN_OVER,), _HELP)


def _notes(argument: Operand) -> tuple[str, ...]:
    if argument.facts is None or argument.facts.dtype not in ("float16", "bfloat16"):
        return ()
    eps = LIMITS[argument.facts.dtype].eps
    return (f"in {argument.facts.dtype} what is closer to 1 than {eps / 4:.3g} is 1, and 1 minus it 0",)


RULE = Rule("NH501", "log-of-nonpositive", "log-of-nonpositive", _judge)

_LOG = OpRecord(5, "aten::log", "birth", "forward", "loss", None, outputs=(ValueFacts((2,), "float32", num_neginf=1),))


def _log_of(value: float) -> Case:
    return Case(_LOG, OffenderEvidence(1, ((1,),), (float("-inf"),), (Operand("self", None, (value,)),)))


_IN_PLACE = OpRecord(5, "aten::log_", "birth", "forward", "loss", None, outputs=_LOG.outputs)

FLAGGED = (_log_of(0.0), _log_of(-2.0), Case(_IN_PLACE, OffenderEvidence(1, ((1,),), (float("-inf"),))))
CLEAN = (_log_of(1e-300), Case(_LOG, None))
