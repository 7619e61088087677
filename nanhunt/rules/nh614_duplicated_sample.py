"""duplicated-sample: samples are the same, bit for bit.

What it does:
    Compares fingerprints of all samples of all batches, of tensors with at least 16 numbers for each sample.

Why it matters:
    Copies count twice in every mean, and copies on both sides of a split make the validation score a lie. A loader
    whose workers share one seed, or a buffer that is used again, shows up like this.

Known limits:
    Oversampling and passes over a small data set repeat samples on purpose. An input that is the same for all samples
    beside one that is not, such as a grid of times, does not count. Tensors that are mostly 0 or hold few different
    values are not judged.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Pair, Spot, TensorAudit
from nanhunt.rules.data_words import number_of, several
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _judge(audit: DataAudit) -> Outcome:
    found = [tensor for tensor in audit.tensors if tensor.equal_samples]
    differing = [tensor for tensor in audit.tensors if not _is_shared(tensor) and not tensor.unjudged]
    return several([_equal(tensor) for tensor in found if not (_is_shared(tensor) and differing)])


def _is_shared(tensor: TensorAudit) -> bool:
    """Whether all samples are the same."""
    return len(tensor.equal_samples) == tensor.num_samples - len(tensor.empty) - 1 > 0


def _equal(tensor: TensorAudit) -> Judgement:
    pair = tensor.equal_samples[0]
    copies = {(pair.second.batch, pair.second.sample) for pair in tensor.equal_samples}
    across = sum(pair.first.batch != pair.second.batch for pair in tensor.equal_samples)
    return Judgement(
        f"{number_of(len(copies), tensor.num_samples, 'sample')} of {tensor.name}"
        f" {'repeats' if len(copies) == 1 else 'repeat'} an earlier one: {pair.second.text} is {pair.first.text}",
        evidence={"num_copies": len(copies), "num_across_batches": across},
        help=("look at the sampler, and at buffers that are used again",),
        location=Location("data", tensor=tensor.name),
    )


RULE = Rule("NH614", "duplicated-sample", "duplicated-sample", _judge, judges=DataAudit, severity="warning")

_PAIR = Pair(Spot(0, 1), Spot(0, 3))
_ALL = tuple(Pair(Spot(0, 0), Spot(0, number)) for number in (1, 2, 3))
_X = TensorAudit("x", num_samples=4)
FLAGGED = (
    DataAudit(1, (TensorAudit("x", num_samples=4, equal_samples=(_PAIR,)),)),
    DataAudit(1, (TensorAudit("x", num_samples=4, equal_samples=_ALL),)),
)
CLEAN = (DataAudit(1, (_X,)), DataAudit(1, (_X, TensorAudit("times", num_samples=4, equal_samples=_ALL))), DataAudit(1))
