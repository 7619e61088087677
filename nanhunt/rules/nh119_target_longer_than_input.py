"""target-longer-than-input: a CTC loss was given a target that no path through its input spells.

What it does:
    Holds where ``ctc_loss`` of finite scores is infinite and the offending sample has fewer frames than labels; and,
    as no other reason is left then, where a target with repeated labels, which need a blank in between, does not fit.

Why it matters:
    The probability of such a target is 0 and its loss infinite; one sample spoils the mean of its batch.

Use instead:
    ``zero_infinity=True``, which leaves such samples out, or data without them: look at how far the input is
    shortened by strides before the loss.

References:
    Graves et al. 2006, "Connectionist temporal classification", ICML.
"""

import math

from nanhunt.records.evidence import OffenderEvidence, Operand
from nanhunt.records.ops import OpRecord, ValueFacts
from nanhunt.rules.offender import (
    at_elements,
    has_infinite_input,
    has_nan_input,
    is_written_by_user,
    numbers,
    values_of,
)
from nanhunt.rules.registry import Case, Judgement, Rule

_LOSSES = ("aten::_ctc_loss", "aten::_cudnn_ctc_loss")


def _judge(case: Case) -> Judgement | None:
    if case.op is None or case.op.op not in _LOSSES or not is_written_by_user(case):
        return None
    if has_nan_input(case) or has_infinite_input(case):
        return None
    assert case.evidence is not None
    if any(result != math.inf for result in case.evidence.results):
        return None
    frames, labels = _lengths(case, "input_lengths"), _lengths(case, "target_lengths")
    if not frames or len(frames) != len(labels):
        return None
    short = [number for number, frame in enumerate(frames) if frame < labels[number]]
    is_short = len(short) == len(frames)
    first = short[0] if short else 0
    spelt = f"{labels[first]:g} labels in {frames[first]:g} frames"
    return Judgement(
        f"a target of {spelt} has the probability 0 {at_elements(case)}",
        evidence=numbers(case, num_frames=frames[first], num_labels=labels[first]),
        notes=() if is_short else ("equal labels in a row need a blank in between, for which no frame is left",),
        help=("use zero_infinity=True, or leave out samples whose input is too short",),
    )


def _lengths(case: Case, name: str) -> tuple[float, ...]:
    """The lengths of the offending samples."""
    assert case.evidence is not None
    listed = dict(case.evidence.lengths).get(name)
    if listed is None:
        return values_of(case, name)
    positions = [position[0] if position else 0 for position in case.evidence.positions]
    return tuple(float(listed[position]) for position in positions if position < len(listed))


RULE = Rule("NH119", "target-longer-than-input", "target-longer-than-input", _judge)


def _loss(frames: int, labels: int, result: float = math.inf) -> Case:
    output = ValueFacts((1,), "float32", num_posinf=1)
    record = OpRecord(5, "aten::_ctc_loss", "birth", "forward", "", None, outputs=(output,))
    lengths = (("input_lengths", (frames,)), ("target_lengths", (labels,)))
    scores = (Operand("log_probs", ValueFacts((frames, 1, 6), "float32", abs_max=2.0)),)
    return Case(record, OffenderEvidence(1, ((0,),), (result,), scores, lengths=lengths))


FLAGGED = (_loss(5, 9), _loss(5, 4))
CLEAN = (_loss(5, 9, math.nan),)
