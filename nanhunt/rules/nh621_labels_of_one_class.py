"""labels-of-one-class: every label is of the same class.

What it does:
    Counts the labels of all batches. It holds where they are of one class, in at least 32 samples; for fewer it says
    that it cannot judge.

Why it matters:
    A model learns from such labels to say one thing. Usual reasons are data sorted by class and not shuffled, and
    labels that were not found and became 0.

Known limits:
    Where positives are rare, 32 samples without one are likely: give more batches. Labels that are neither whole
    numbers nor 0 and 1 are no classes.
"""

from nanhunt.findings import Location, Skip
from nanhunt.numerics import count
from nanhunt.records.data_audit import DataAudit, LabelAudit
from nanhunt.rules.registry import Judgement, Outcome, Rule

MIN_SAMPLES = 32


def _judge(audit: DataAudit) -> Outcome:
    labels = audit.labels
    if labels is None or len(labels.counts) != 1:
        return None
    (label,) = labels.counts
    if labels.num_samples < MIN_SAMPLES:
        return Skip(labels.name, f"{count(labels.num_samples, 'sample')} of class {label} are too few to judge by")
    return Judgement(
        f"all {labels.num_labels:,} labels are {label}, in {count(labels.num_samples, 'sample')}",
        evidence={"class": label, "num_labels": labels.num_labels, "num_samples": labels.num_samples},
        help=("look at the order of the data, and at where labels are read",),
        location=Location("data", tensor=labels.name),
    )


RULE = Rule("NH621", "labels-of-one-class", "labels-of-one-class", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (), LabelAudit("labels", num_samples=64, num_labels=64, counts={0: 64})),)
CLEAN = (
    DataAudit(1, (), LabelAudit("labels", num_samples=64, num_labels=64, counts={0: 60, 1: 4})),
    DataAudit(1, (), LabelAudit("labels", "float32", num_samples=64, num_labels=64)),
    DataAudit(1),
)
