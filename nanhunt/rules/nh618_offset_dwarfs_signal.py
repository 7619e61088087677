"""offset-dwarfs-signal: a channel varies so little around a large value that rounding is felt.

What it does:
    Compares mean and standard deviation of each channel of a sample, or of each feature over all samples. It holds
    where rounding of the mean is more than 1e-4 of the deviation: from a ratio of 840 on in float32, and of 10 in half
    precision. That a signal has become a few neighbouring values does not hide it, where these are beyond the scale of
    standardised data: 2900 in float32, 32 in float16.

Why it matters:
    Time stamps in seconds since 1970 and an amplifier's offset are like this. Only the last bits tell samples apart,
    and the first layer loses them.

Use instead:
    Take the mean away in float64, where the data are read.

Known limits:
    Channels of fewer than 32 positions, and features of fewer than 32 samples, are not judged.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit
from nanhunt.rules.data_words import for_each_tensor
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.offset:
        return None
    worst = max(tensor.offset, key=lambda spot: abs(spot.value))
    channels = sorted({spot.channel for spot in tensor.offset if spot.channel is not None})
    where = f" in {worst.text}" if tensor.axis == "channel" else ""
    return Judgement(
        f"{tensor.axis} {worst.channel} of {tensor.name} has a mean of {abs(worst.value):.3g} deviations{where}",
        evidence={"mean_over_std": worst.value, "dtype": tensor.dtype, "where": channels[:8]},
        help=("take the mean away in float64, where the data are read",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH618", "offset-dwarfs-signal", "offset-dwarfs-signal", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (TensorAudit("x", num_samples=8, offset=(Spot(0, 1, 2, 5000.0),)),)),)
CLEAN = (DataAudit(1, (TensorAudit("x", num_samples=8),)), DataAudit(1))
