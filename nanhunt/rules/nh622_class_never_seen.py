"""class-never-seen: a class below the largest label has no label.

What it does:
    Looks at whole-number labels from 0 to at most 99, in at least 50 labels for each class. It holds where a class
    below the largest one was never seen.

Why it matters:
    Labels that begin at 1 leave output 0 without a use and need one output more than there are classes; a class that
    was lost on the way is never learned.

Known limits:
    Rare classes may be missing from the batches that were looked at. Whether the model has an output for each label
    cannot be told from the data.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, LabelAudit, first_few
from nanhunt.rules.registry import Judgement, Outcome, Rule

MAX_CLASSES = 100
MIN_EACH = 50


def _judge(audit: DataAudit) -> Outcome:
    labels = audit.labels
    if labels is None or len(labels.counts) < 2 or min(labels.counts) < 0:
        return None
    number = max(labels.counts) + 1
    missing = [label for label in range(number) if label not in labels.counts]
    # Per-position labels come in runs: it is samples that are drawn.
    if not missing or number > MAX_CLASSES or min(labels.num_labels, labels.num_samples) < MIN_EACH * number:
        return None
    names = first_few(missing, 8)
    return Judgement(
        f"no label of {labels.num_labels:,} is {names}, while the largest is {number - 1}",
        evidence={"num_missing": len(missing), "num_classes": number},
        notes=("labels that begin at 1 need one output more than there are classes",) if missing == [0] else (),
        help=("look at how class names become numbers",),
        location=Location("data", tensor=labels.name),
    )


RULE = Rule("NH622", "class-never-seen", "class-never-seen", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (), LabelAudit("y", num_samples=900, num_labels=900, counts={1: 300, 2: 300, 3: 300})),)
CLEAN = (
    DataAudit(1, (), LabelAudit("y", num_samples=900, num_labels=900, counts={0: 300, 1: 300, 2: 300})),
    DataAudit(1, (), LabelAudit("y", num_samples=8, num_labels=8, counts={1: 4, 3: 4})),
    DataAudit(1, (), LabelAudit("y", num_samples=900, num_labels=900, counts={-1: 450, 1: 450})),
    DataAudit(1, (), LabelAudit("input_ids", num_samples=900, num_labels=9000, counts={7: 4500, 4211: 4500})),
    DataAudit(1),
)
