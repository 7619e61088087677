"""log-of-nonpositive: the logarithm of zero or of a negative number was taken.

What it does:
    Looks at the argument of ``log``, ``log2``, ``log10`` and ``log1p`` at the offending elements. The rule holds only
    if all of them lie at or below the edge of the domain. Of an operation in place the argument is gone; -inf says
    that it was on the edge, NaN that it was below.

Why it matters:
    log(0) is -inf and log of a negative number is NaN; in a loss that is the end of the step.

Use instead:
    Of a probability, ``logsigmoid``, ``log_softmax`` or ``softplus`` on the logits, and of a sum of exponentials
    ``logsumexp``: they never form the number whose logarithm is wanted. Of a power, a price or a count, an eps that
    suits its scale.

Known limits:
    What made the argument, and so which of these to use, is known as far as autograd remembers it.
"""

import math

from nanhunt.numerics import LIMITS
from nanhunt.records.evidence import OffenderEvidence, Operand, Producer
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import WRITTEN_OVER, at_first, base_name, is_in_place, numbers, quoted
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.source_words import is_of_difference_from_one

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
    return Judgement(
        f"{name} of {quoted(case, argument.at_offenders)}",
        evidence=numbers(case, lowest_argument=min(argument.at_offenders) + 0.0),
        notes=_notes(case, argument),
        help=_help(argument, edge),
    )


_PROBABILITIES = ("sigmoid", "softmax", "safe_softmax")


def _help(argument: Operand, edge: float) -> tuple[str, ...]:
    """What to try, by what made the argument, as far as that is known."""
    if _is_sum_of_exponentials(argument):
        return ("use torch.logsumexp, which subtracts the largest exponent first",)
    if any(producer.op in _PROBABILITIES for producer in argument.made_by):
        return ("work on the logits: logsigmoid, log_softmax or softplus do not form the argument at all",)
    if argument.at_offenders and max(argument.at_offenders) < edge:
        return (f"look at how the argument comes below {edge:g}: the logarithm has no value there, whatever the eps",)
    return (
        f"keep the argument above {edge:g} where it is made, with an eps that suits its scale;"
        " of a probability, take logsigmoid, log_softmax or softplus of the logits instead",
    )


def _is_sum_of_exponentials(argument: Operand) -> bool:
    return any(producer.op in ("sum", "mean") and producer.of == ("exp",) for producer in argument.made_by[:1])


def _judge_in_place(case: Case, name: str) -> Judgement | None:
    assert case.evidence is not None
    results = case.evidence.results
    if not results or any(result == math.inf for result in results):
        return None
    what = f"{_EDGES[name]:g}" if results[0] == -math.inf else f"a number below {_EDGES[name]:g}"
    of = f"{name} of {what} {at_first(case, results)}"
    return Judgement(of, numbers(case), (WRITTEN_OVER,), _help(Operand("self", None), _EDGES[name]))


def _notes(case: Case, argument: Operand) -> tuple[str, ...]:
    """How a sum or a difference came to be 0, where it is known to be one."""
    if _is_sum_of_exponentials(argument):
        return ("it is a sum of exponentials, and all of them are 0 there",)
    if argument.facts is None or argument.facts.dtype not in ("float16", "bfloat16"):
        return ()
    is_difference = any(producer.op in ("sub", "rsub") for producer in argument.made_by)
    if base_name(case) != "log1p" and not is_difference and not is_of_difference_from_one(case):
        return ()
    eps = LIMITS[argument.facts.dtype].eps
    return (f"in {argument.facts.dtype} what is closer to 1 than {eps / 4:.3g} is 1, and 1 minus it 0",)


RULE = Rule("NH501", "log-of-nonpositive", "log-of-nonpositive", _judge)

_LOG = OpRecord(5, "aten::log", "birth", "forward", "loss", None, outputs=(ValueFacts((2,), "float32", num_neginf=1),))


def _log_of(*values: float, made_by: tuple[Producer, ...] = ()) -> Case:
    positions, results = tuple((number,) for number in range(len(values))), (-math.inf,) * len(values)
    operands = (Operand("self", ValueFacts((4,), "float32"), values, made_by),)
    return Case(_LOG, OffenderEvidence(len(values), positions, results, operands))


_IN_PLACE = OpRecord(5, "aten::log_", "birth", "forward", "loss", None, outputs=_LOG.outputs)

FLAGGED = (
    _log_of(0.0),
    _log_of(0.0, -2.0),
    _log_of(0.0, made_by=(Producer("sum", "float32", of=("exp",)),)),
    Case(_IN_PLACE, OffenderEvidence(1, ((1,),), (float("-inf"),))),
)
CLEAN = (_log_of(1e-300), Case(_LOG, None))
