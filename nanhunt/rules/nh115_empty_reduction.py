"""empty-reduction: a mean, a deviation or a loss was taken over too few values to have one.

What it does:
    Counts what went in. The rule holds where a mean, median, deviation or averaged loss was given no element; where a
    variance was given no more values than its correction, one by default; where a batch norm updates its running
    variance from one value per channel; where a classification loss is averaged over a total weight of 0; and where
    ``nanmean`` finds nothing but NaN.

Why it matters:
    The mean over nothing is 0 / 0. A batch with no positive, no match or no valid token comes sooner or later.

Example:
    ``loss[mask].mean()`` with an empty mask; ``x.std(0)`` of a batch of one

Use instead:
    A sum divided by the number of items, at least 1; ``correction=0`` for a deviation of a few values; a last batch
    that is dropped.
"""

import math

from nanhunt.numerics import LIMITS, count
from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, SourceLine, ValueFacts
from nanhunt.rules.offender import (
    at_elements,
    base_name,
    has_infinite_input,
    has_nan_input,
    is_written_by_user,
    numbers,
)
from nanhunt.rules.registry import Case, Judgement, Rule
from nanhunt.rules.source_words import is_nanmean

_AVERAGES = ("mean", "nanmean", "median", "nanmedian")
_DEVIATIONS = ("var", "std", "var_mean", "std_mean")


def _judge(case: Case) -> Judgement | None:
    if not is_written_by_user(case) or has_nan_input(case) or has_infinite_input(case):
        return None
    assert case.op is not None
    assert case.evidence is not None
    name = base_name(case)
    if name not in _DEVIATIONS and not all(math.isnan(result) for result in case.evidence.results):
        return None
    if name == "div":
        return _judge_nanmean(case)
    given = case.operand("input" if name == "native_batch_norm" else "self")
    if given is None or given.facts is None:
        return None
    if name.startswith("nll_loss"):
        return _judge_classification(case, given)
    num_given, num_made = given.facts.num_elements, max(1, case.op.outputs[0].num_elements)
    if num_given == 0 and (name in _AVERAGES or name in _DEVIATIONS or "loss" in name):
        message = f"{case.op.op} over no element at all: its input has the shape {list(given.facts.shape)}"
        return Judgement(message, numbers(case, num_values=0), (), _HELP)
    if name in _DEVIATIONS:
        return _judge_deviation(case, num_given // num_made)
    is_statistic = name == "native_batch_norm" and len(case.op.outputs[0].shape) == 1
    if is_statistic and num_given == num_made:
        message = f"{case.op.op} took the variance of 1 value for each of {count(num_made, 'channel')}"
        help_ = ("drop the last batch where it holds one sample, or use a norm over the features",)
        return Judgement(message, numbers(case, num_values=1), (), help_)
    return None


_HELP = ("divide the sum by the number of items, at least 1, or leave such a batch out",)


def _judge_nanmean(case: Case) -> Judgement | None:
    """The quotient that ``nanmean`` ends with: the sum without NaN over the count of the others."""
    divisor = case.operand("other")
    if divisor is None or divisor.facts is None or not divisor.at_offenders or not is_nanmean(case):
        return None
    if divisor.facts.dtype != "int64" or any(divisor.at_offenders):
        return None
    return Judgement(
        f"nanmean of values that are all NaN {at_elements(case)}",
        evidence=numbers(case, num_values=0),
        help=("leave such rows out, or divide the nansum by the number of values, at least 1",),
    )


def _judge_deviation(case: Case, num_values: int) -> Judgement | None:
    assert case.op is not None
    correction = case.operand("correction")
    taken_off = correction.at_offenders[0] if correction is not None else 1.0
    if num_values > taken_off:
        return None
    return Judgement(
        f"{case.op.op} over {count(num_values, 'value')} with a correction of {taken_off:g}",
        evidence=numbers(case, num_values=num_values, correction=taken_off),
        help=("use correction=0 where there may be one value only, or leave such a batch out",),
    )


def _judge_classification(case: Case, given: Operand) -> Judgement | None:
    """An averaged loss of finite scores is NaN only where the weights it divides by come to 0."""
    assert case.op is not None
    assert given.facts is not None
    reduction, limits = case.operand("reduction"), LIMITS.get(given.facts.dtype)
    weight = case.operand("weight")
    heaviest = weight.facts.abs_max or 0.0 if weight is not None and weight.facts is not None else 1.0
    largest = (given.facts.abs_max or 0.0) * max(1.0, heaviest) * max(1, given.facts.num_elements)
    if limits is None or largest > limits.max or (reduction is not None and reduction.at_offenders != (1.0,)):
        return None
    return Judgement(
        f"{case.op.op} averaged over a total weight of 0: every target is ignored or has the weight 0",
        evidence=numbers(case, total_weight=0.0),
        help=("divide the summed loss by the number of targets that count, at least 1, or leave such a batch out",),
    )


RULE = Rule("NH115", "empty-reduction", "empty-reduction", _judge, goes_before=("NH103",))


def _over(op: str, *shape: int, made: tuple[int, ...] = (), abs_max: float | None = 1.0, **given: float) -> Case:
    record = OpRecord(3, op, "birth", "forward", "", None, outputs=(ValueFacts(made, "float32", num_nan=1),))
    name = "input" if "norm" in op else "self"
    operands = (
        Operand(name, ValueFacts(shape, "float32", abs_max=abs_max)),
        *(Operand(key, None, (value,)) for key, value in given.items()),
    )
    return Case(record, OffenderEvidence(1, ((0,) * len(made),), (math.nan,), operands))


def _quotient(text: str, count_type: str = "int64") -> Case:
    output = ValueFacts((3,), "float32", num_nan=1)
    record = OpRecord(9, "aten::div", "birth", "forward", "", SourceLine("model.py", 7, text), outputs=(output,))
    operands = (
        Operand("self", ValueFacts((3,), "float32"), (0.0,)),
        Operand("other", ValueFacts((3,), count_type), (0.0,)),
    )
    return Case(record, OffenderEvidence(1, ((1,),), (math.nan,), operands))


FLAGGED = (
    _quotient("f = x.nanmean(1)"),
    _over("aten::mean", 0, abs_max=None),
    _over("aten::smooth_l1_loss", 0, 4, abs_max=None, reduction=1.0),
    _over("aten::std", 1, 3, made=(3,), correction=1.0),
    _over("aten::var", 1),
    _over("aten::native_batch_norm", 1, 4, made=(4,)),
    _over("aten::nll_loss_forward", 6, 3, reduction=1.0, ignore_index=-100.0),
)
CLEAN = (
    _quotient("f = x.nanmean(1) / count"),
    _quotient("f = x.nanmean(1)", "float32"),
    _quotient("f = total / count"),
    _over("aten::mean", 4),
    _over("aten::std", 2, 3, made=(3,), correction=1.0),
    _over("aten::std", 1, 3, made=(3,), correction=0.0),
    _over("aten::nll_loss_forward", 6, 3, abs_max=1e38, reduction=1.0),
    _over("aten::native_batch_norm", 8, 4, made=(4,)),
)
