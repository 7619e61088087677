"""sample-out-of-scale: a sample is far larger or smaller than the others.

What it does:
    Compares standard deviations of the samples of all batches, on a logarithmic scale. It holds where one is more than
    1000 times the middle one, or less than a thousandth, and more than 6 robust standard deviations away.

Why it matters:
    Recordings in different units (volts beside microvolts is a factor of a million), or one that is damaged. Its
    gradient is as far out of scale as it is itself.

Use instead:
    Convert to one unit where the recordings are read, or standardise each.

Known limits:
    At least 4 samples are needed. Where sizes range widely anyway, none stands out.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, places
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.samples_out_of_scale:
        return None
    worst = max(tensor.samples_out_of_scale, key=lambda spot: max(spot.value, 1 / spot.value))
    size = f"{worst.value:.3g} times" if worst.value > 1 else f"1/{1 / worst.value:.3g} of"
    number = len(tensor.samples_out_of_scale)
    return Judgement(
        f"{worst.text} of {tensor.name} has {size} the deviation of the middle one",
        evidence={"ratio": worst.value, "where": places(tensor.samples_out_of_scale)},
        notes=(f"{number_of(number, tensor.num_samples, 'sample')} out of scale",) if number > 1 else (),
        help=("look at the unit in which this sample was read",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH617", "sample-out-of-scale", "sample-out-of-scale", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (TensorAudit("x", num_samples=8, samples_out_of_scale=(Spot(0, 3, None, 1e6),)),)),)
CLEAN = (DataAudit(1, (TensorAudit("x", num_samples=8),)), DataAudit(1))
