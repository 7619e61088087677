"""The verdict: what the replays allow to be said, and nothing else."""

from collections.abc import Sequence

from nanhunt.findings import Certainty, Finding, Verdict
from nanhunt.records.steps import ExperimentResult, GridCell, StepOutcome

LEGACY_LIMITS = (
    "this file holds a batch only; the weights, the optimizer state and the random numbers of the failing step are not "
    "in it. A finite replay on fresh weights does not show that the data or the architecture are sound, nor that the "
    "damage was cumulative: the failing step itself cannot be run again"
)


def decide(
    baseline: StepOutcome | None,
    finding: Finding | None,
    experiments: Sequence[ExperimentResult],
    grid: Sequence[GridCell],
    *,
    is_legacy: bool,
    is_captured: bool = True,
) -> Verdict:
    """Draws the conclusion.

    Args:
        baseline: The step as captured (or on fresh weights, where no others are known).
        finding: The first offender.
        experiments: What was tried.
        grid: Weights against batches.
        is_legacy: Whether the capture holds a batch only.
        is_captured: Whether the baseline ran on the captured weights.
    """
    flipped = tuple(result.name for result in experiments if result.outcome and result.outcome.is_finite)
    unmoved = tuple(result.name for result in experiments if result.outcome and not result.outcome.is_finite)
    if baseline is None:
        return Verdict("unknown", ("the step was not run",))
    limits = (LEGACY_LIMITS,) if is_legacy and not is_captured else ()
    if baseline.is_finite and limits:
        return Verdict("unknown", (_legacy_result(baseline, grid), *limits), flipped, unmoved)
    if baseline.is_finite and finding is not None:
        text = f"{finding.cause}: loss, gradients and weights stay finite, a buffer or the optimizer's state does not"
        return Verdict(finding.certainty, (text,), flipped, unmoved)
    if baseline.is_finite:
        text = "the step is finite when it is run again: what made it fail is not in the capture, or did not recur"
        return Verdict("unknown", (text,), flipped, unmoved)
    culprits = [result for result in experiments if result.name in flipped and result.family in ("offender", "model")]
    tested: Certainty = "tested" if culprits else ("observed" if finding and finding.cause != "unknown" else "unknown")
    cause = _cause(finding, experiments, culprits) if finding else _no_cause(baseline)
    parts = [cause, *_masks(experiments), *_data(experiments, grid)]
    return Verdict(tested, (*parts, *limits), flipped, unmoved)


def _legacy_result(baseline: StepOutcome, grid: Sequence[GridCell]) -> str:
    fresh = [cell for cell in grid if cell.weights == "fresh" and cell.batch == "bad"]
    finite = sum(1 for cell in fresh if cell.outcome.is_finite)
    if not fresh:
        return "the batch was run on fresh weights: " + ("finite" if baseline.is_finite else "non-finite")
    return f"on fresh weights the batch is finite with {finite} of {len(fresh)} seeds"


def _no_cause(baseline: StepOutcome) -> str:
    if baseline.error:
        return (
            f"no operation made a non-finite value that did harm before the step ended in {baseline.error.rstrip('.')}"
        )
    return "the step is non-finite, but no operation was seen to cause it"


def _cause(finding: Finding, experiments: Sequence[ExperimentResult], culprits: Sequence[ExperimentResult]) -> str:
    if culprits:
        changed = " and, on its own, ".join(result.title for result in culprits)
        return f"{finding.cause}: the step becomes finite with {changed}"
    if not finding.location.op:
        return f"{finding.cause} was observed: it was there before any operation of the replayed step"
    tried = [r.title for r in experiments if r.outcome is not None and r.family in ("offender", "model")]
    if tried:
        reason = f"the step is still non-finite with {'; '.join(tried)}"
    else:
        reason = "no change that would take the operation out of the step could be run"
    if finding.cause == "unknown":
        return f"where it begins is known, why is not: {reason}"
    return f"{finding.cause} was observed; {reason}"


def _masks(experiments: Sequence[ExperimentResult]) -> list[str]:
    parts: list[str] = []
    tried = [r for r in experiments if r.outcome is not None and r.family in ("mask", "optimizer")]
    unmoved = [r.title for r in tried if r.outcome and not r.outcome.is_finite]
    moved = [r for r in tried if r.outcome and r.outcome.is_finite]
    hidden = [r.title for r in moved if r.family == "mask"]
    helped = [r.title for r in moved if r.family == "optimizer"]
    if helped:
        parts.append(f"finite with another optimizer setting: {'; '.join(helped)}")
    if unmoved:
        parts.append(f"still non-finite: {'; '.join(unmoved)}")
    if hidden:
        parts.append(f"finite, but a mask: {'; '.join(hidden)}")
    precise = [r for r in experiments if r.family == "precision" and r.outcome is not None]
    for result in precise:
        finite = result.outcome is not None and result.outcome.is_finite
        hangs = "finite: it hangs on the range or the rounding of the captured types"
        parts.append(f"{result.title} is {hangs if finite else 'non-finite as well'}")
    return parts


def _data(experiments: Sequence[ExperimentResult], grid: Sequence[GridCell]) -> list[str]:
    parts: list[str] = []
    samples = [r for r in experiments if r.family == "data" and r.outcome is not None]
    moved = [r.title for r in samples if r.outcome and r.outcome.is_finite]
    if samples:
        parts.append(_samples(moved, len(samples)))
    fresh = [cell for cell in grid if cell.weights == "fresh" and cell.batch == "bad"]
    if fresh:
        finite = sum(1 for cell in fresh if cell.outcome.is_finite)
        parts.append(f"on fresh weights the same batch is finite with {finite} of {len(fresh)} seeds")
    control = [cell for cell in grid if cell.weights != "fresh" and cell.batch == "control"]
    words = {True: "finite", False: "non-finite too"}
    parts += [f"on these weights the control batch is {words[cell.outcome.is_finite]}" for cell in control]
    return parts


def _samples(moved: Sequence[str], num_tried: int) -> str:
    if not moved:
        return "no single replaced sample makes it finite"
    if len(moved) == num_tried > 1:
        return f"finite with each of {num_tried} replacements of samples: no one sample carries it"
    return f"finite with {', or with '.join(moved)}"
