"""unusable-labels: labels are NaN, all ignored, below 0, or do not sum to 1.

What it does:
    Counts labels that are not finite; batches in which every label is -100, torch's ``ignore_index``; whole-number
    labels below 0 other than -100 and -1; and rows that sum to something else than 1 among rows that do.

Why it matters:
    A mean over no labels is 0/0, so one batch of ignored labels makes the loss NaN. A label below 0 is an index
    outside of the outputs: an error on a processor, and on a GPU an assertion far from its cause.

Known limits:
    -1 is often another ``ignore_index``, or one of the two classes of a hinge loss, and does not count. Whether the
    model has an output for the largest label cannot be told from the data.

References:
    pytorch#70348 (mean of ``cross_entropy`` over no labels).
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.data_audit import DataAudit, LabelAudit
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _judge(audit: DataAudit) -> Outcome:
    labels = audit.labels
    fault = _fault(labels) if labels is not None else None
    if labels is None or fault is None:
        return None
    message, evidence, advice = fault
    return Judgement(
        f"{labels.name}: {message}",
        evidence=evidence,
        help=(advice,),
        location=Location("data", tensor=labels.name),
    )


def _fault(labels: LabelAudit) -> tuple[str, dict[str, object], str] | None:
    """What is wrong, its numbers and what to try."""
    if labels.num_nonfinite:
        message = f"{count(labels.num_nonfinite, 'label')} not finite, in {count(labels.num_samples, 'sample')}"
        return message, {"num_nonfinite": labels.num_nonfinite}, "look at where these labels are read"
    if labels.all_ignored:
        message = f"every label of batch {labels.all_ignored[0]} is -100, which cross_entropy ignores: its mean is 0/0"
        return message, {"batches": list(labels.all_ignored[:8])}, "leave out batches that have no label"
    below = {label: number for label, number in labels.counts.items() if label < -1}
    if below:
        message = f"{count(sum(below.values()), 'label')} below 0, the least {min(below)}"
        return message, {"num_below": sum(below.values())}, "use -100, or the ignore_index of the loss, for no label"
    odd = labels.num_rows - labels.num_distributions
    if 0 < odd < labels.num_rows / 2:
        message = f"{odd:,} of {labels.num_rows:,} rows do not sum to 1, though the others do"
        return message, {"lowest_sum": labels.sums[0], "highest_sum": labels.sums[1]}, "normalise every row"
    return None


RULE = Rule("NH623", "unusable-labels", "unusable-labels", _judge, judges=DataAudit)

_SOFT = LabelAudit("y", "float32", (8, 3), 8, 24, num_rows=8, num_distributions=7, sums=(0.5, 1.0))
FLAGGED = (
    DataAudit(1, (), LabelAudit("y", "float32", num_samples=8, num_nonfinite=1)),
    DataAudit(1, (), LabelAudit("y", num_samples=8, num_ignored=8, all_ignored=(0,))),
    DataAudit(1, (), LabelAudit("y", num_samples=8, num_labels=8, counts={-7: 1, 0: 7})),
    DataAudit(1, (), _SOFT),
)
CLEAN = (
    DataAudit(1, (), LabelAudit("y", num_samples=8, num_labels=8, counts={-1: 4, 1: 4})),
    DataAudit(1, (), LabelAudit("y", num_samples=8, num_labels=4, num_ignored=4, counts={0: 2, 1: 2})),
    DataAudit(1, (), LabelAudit("y", "float32", (8, 3), 8, 24, num_rows=8, num_distributions=2, sums=(0.0, 3.0))),
    DataAudit(1),
)
