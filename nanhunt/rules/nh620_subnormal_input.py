"""subnormal-input: a good part of the input is below the smallest normal number of its type.

What it does:
    Counts elements that are not 0 and smaller than the smallest normal number: 1.2e-38 in float32, 6.1e-5 in float16.
    It holds where they are more than 1 %.

Why it matters:
    They have few bits left, many devices turn them into 0, and processors that do not are many times slower on them.
    In float16 ordinary small values are among them.

Use instead:
    Scale the data where they are read, or keep them in float32.

Known limits:
    Values of float16 data that are meant to be nearly 0 are counted as well.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, TensorAudit
from nanhunt.rules.data_words import for_each_tensor
from nanhunt.rules.registry import Judgement, Outcome, Rule

SHARE = 0.01


def _look(tensor: TensorAudit) -> Judgement | None:
    share = tensor.num_subnormal / max(tensor.num_elements, 1)
    if share <= SHARE:
        return None
    return Judgement(
        f"{share:.1%} of {tensor.name} is subnormal in {tensor.dtype}",
        evidence={"num_subnormal": tensor.num_subnormal, "std": tensor.std},
        help=("scale the data where they are read, or keep them in float32",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH620", "subnormal-input", "subnormal-input", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (TensorAudit("x", "float16", num_elements=100, num_subnormal=40),)),)
CLEAN = (DataAudit(1, (TensorAudit("x", num_elements=1000, num_subnormal=1),)), DataAudit(1))
