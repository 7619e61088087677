"""empty-sample: a sample is constant throughout.

What it does:
    Looks for samples in which every channel keeps one value, beside samples that do not; and for inputs that are 0
    throughout, where nothing else is given.

Why it matters:
    Normalising such a sample divides by 0, its gradient through a norm or a root is infinite, and it teaches nothing.

Use instead:
    Leave out windows that are nothing but padding.

Known limits:
    Tensors that are mostly 0 or hold few different values are not judged, so blank images among drawings are not seen.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, places
from nanhunt.rules.data_words import number_of, several
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _judge(audit: DataAudit) -> Outcome:
    found = [_empty(tensor) for tensor in audit.tensors if tensor.empty]
    if len(audit.tensors) == 1 and not audit.has_lengths:
        (only,) = audit.tensors
        if only.num_elements > 1 and only.low == only.high == 0.0 and not only.num_nonfinite:
            found = [
                Judgement(
                    f"every value of {only.name} is 0",
                    evidence={"num_elements": only.num_elements},
                    help=("look at how the batches are read",),
                    location=Location("data", tensor=only.name),
                )
            ]
    return several(found)


def _empty(tensor: TensorAudit) -> Judgement:
    return Judgement(
        f"{number_of(len(tensor.empty), tensor.num_samples, 'sample')} of {tensor.name}"
        f" {'holds' if len(tensor.empty) == 1 else 'hold'} one value throughout",
        evidence={"num_empty": len(tensor.empty), "where": places(tensor.empty)},
        help=("leave out samples that hold nothing",),
        location=Location("data", tensor=tensor.name),
    )


RULE = Rule("NH612", "empty-sample", "empty-sample", _judge, judges=DataAudit, severity="warning")

_X = TensorAudit("x", num_samples=8, num_elements=800, low=-1.0, high=1.0)
_ZERO = TensorAudit("h0", num_samples=8, num_elements=800)
FLAGGED = (
    DataAudit(1, (TensorAudit("x", num_samples=8, low=-1.0, high=1.0, empty=(Spot(0, 3),)),)),
    DataAudit(1, (_ZERO,)),
)
CLEAN = (DataAudit(1, (_X,)), DataAudit(1, (_X, _ZERO)), DataAudit(1))
