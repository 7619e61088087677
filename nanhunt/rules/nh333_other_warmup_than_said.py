"""other-warmup-than-said: the warm-up of the real curve is longer or shorter than it is said to be.

What it does:
    Counts the updates before the schedule's first step at the highest rate, and compares with ``warmup_steps``. It
    holds where they differ by more than a twentieth and more than two steps.

Why it matters:
    The usual reasons are a schedule stepped once per batch that counts accumulated updates, or one that was given the
    length of another run. Too short a warm-up is no warm-up; in one that is too long, training ends before it begins.

Known limits:
    A warm-up that only levels off has no sharp end. Of a schedule that is under way and cannot be asked for its
    earlier steps, the rule judges a warm-up that has not ended yet.
"""

from itertools import pairwise

from nanhunt.findings import Location, Skip
from nanhunt.records.optimizer_audit import ScheduleCurve
from nanhunt.rules.registry import Judgement, Rule


def _judge(curve: ScheduleCurve) -> Judgement | Skip | None:
    said, measured = curve.said_warmup, curve.peak_step
    if said is None:
        return Skip("the warm-up", "nobody says how long it is meant to be (warmup_steps)")
    if curve.start and not _rises_at_first(curve):
        return Skip(
            "the warm-up", f"the schedule is under way at step {curve.start:,} and cannot be asked for the past"
        )
    if abs(measured - said) <= max(2, said / 20):
        return None
    first = curve.at(0)
    if measured == 0 and said > 1 and first is not None and first > 0:
        # No warm-up at all is another rule.
        return None
    is_cut = measured >= curve.num_steps - 1
    what = f"has not ended after {curve.num_steps:,} steps" if is_cut else f"takes {measured:,} updates"
    return Judgement(
        f"the warm-up{curve.whose} {what}, not the {said:,} that are said",
        evidence={"said": said, "measured": measured, "num_steps": curve.num_steps},
        help=("check what the schedule counts: updates, batches or epochs",),
        location=Location("optimizer", step=measured),
    )


def _rises_at_first(curve: ScheduleCurve) -> bool:
    """Whether the schedule stands in its warm-up."""
    before = [rate for step, rate in curve.samples if step <= curve.peak_step]
    return len(before) > 1 and all(later > earlier for earlier, later in pairwise(before))


RULE = Rule("NH333", "other-warmup-than-said", "other-warmup-than-said", _judge, ScheduleCurve, "warning")


def _curve(peak_step: int, said: int | None, num_steps: int = 10_000, start: int = 0) -> ScheduleCurve:
    samples = ((start, 1e-6), (start + 1, 2e-6), (peak_step, 1e-3), (num_steps - 1, 0.0))
    return ScheduleCurve("LambdaLR", num_steps, samples, 1e-3, peak_step, said, start=start)


FLAGGED = (_curve(1000, 100), _curve(10, 100))
CLEAN = (_curve(99, 100), _curve(100, 100), _curve(300, 300, start=200))
