"""non-finite-sample: the batches hold NaN or infinity.

What it does:
    Counts non-finite elements in every floating-point tensor that is not the labels.

Why it matters:
    One such element makes the loss NaN, and one step later every weight.

Use instead:
    Check recordings where they are read; refuse or repair them there.

Known limits:
    Missing values that the model expects as NaN, and replaces itself, are reported as well.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, places
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.num_nonfinite:
        return None
    samples = {(spot.batch, spot.sample) for spot in tensor.nonfinite}
    return Judgement(
        f"{tensor.name} holds {count(tensor.num_nonfinite, 'non-finite element')}, in"
        f" {number_of(len(samples), tensor.num_samples, 'sample')}",
        evidence={
            "num_nonfinite": tensor.num_nonfinite,
            "num_samples": len(samples),
            "where": places(tensor.nonfinite),
        },
        help=("look at how these samples were read; refuse or repair them there",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH610", "non-finite-sample", "non-finite-sample", _judge, judges=DataAudit)

_X = TensorAudit("x", num_samples=8, num_channels=4, num_elements=800)
FLAGGED = (DataAudit(1, (TensorAudit("x", num_samples=8, num_nonfinite=3, nonfinite=(Spot(0, 2, 1),)),)),)
CLEAN = (DataAudit(1, (_X,)), DataAudit(1))
