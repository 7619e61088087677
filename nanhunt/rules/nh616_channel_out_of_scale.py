"""channel-out-of-scale: a channel is far larger or smaller than the others.

What it does:
    Compares standard deviations of the channels of a waveform, or of the features of a matrix, on a logarithmic scale.
    It holds where one is more than 50 times the middle one, or less than a fiftieth, and more than 6 robust standard
    deviations away from the others; or 20 times and 10 deviations.

Why it matters:
    Channels in different units (volts beside microvolts), or a channel that holds next to nothing. The large one
    decides every sum, and its weights get all the gradient.

Use instead:
    Convert to one unit, or standardise each channel.

Known limits:
    At least 4 channels are needed, and 32 samples for features. Where sizes range widely anyway, as in features of
    different kinds, none stands out.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import ChannelScale, DataAudit, TensorAudit
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.channels_out_of_scale:
        return None
    worst = max(tensor.channels_out_of_scale, key=lambda scale: scale.deviations)
    size = f"{worst.ratio:.3g} times" if worst.ratio > 1 else f"1/{1 / worst.ratio:.3g} of"
    number = len(tensor.channels_out_of_scale)
    return Judgement(
        f"{tensor.axis} {worst.channel} of {tensor.name} has {size} the deviation of the middle one",
        evidence={
            "std": worst.std,
            "ratio": worst.ratio,
            "robust_deviations": worst.deviations,
            "out_of_scale": [scale.channel for scale in tensor.channels_out_of_scale[:8]],
        },
        notes=(f"{number_of(number, tensor.num_channels, tensor.axis)} out of scale",) if number > 1 else (),
        help=("convert to one unit, or standardise each channel",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH616", "channel-out-of-scale", "channel-out-of-scale", _judge, judges=DataAudit, severity="warning")

_LARGE, _SMALL = ChannelScale(3, 1e6, 1e6, 40.0), ChannelScale(7, 0.01, 0.01, 12.0)
FLAGGED = (
    DataAudit(1, (TensorAudit("x", num_channels=19, channels_out_of_scale=(_LARGE,)),)),
    DataAudit(1, (TensorAudit("x", num_channels=19, channels_out_of_scale=(_SMALL, _LARGE)),)),
)
CLEAN = (DataAudit(1, (TensorAudit("x", num_channels=19),)), DataAudit(1))
