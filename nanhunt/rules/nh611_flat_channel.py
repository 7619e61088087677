"""flat-channel: a channel is constant in a sample, or in a good part of one, while others are not.

What it does:
    Looks at the channels of each sample, without the zeros at its ends that are the same for all channels. It holds
    where a channel keeps one value, or differs from it by rounding only; and in waveforms where it keeps one for more
    than a quarter of the sample. Of a matrix of samples and features, over all batches, columns that keep a value
    other than 0.

Why it matters:
    A loose electrode or a dead sensor carries nothing, and dividing by its deviation divides by 0. Two flat channels
    are also equal: correlations between them are 0/0, and graphs built from them have tied eigenvalues, whose gradient
    is infinite (NH203).

Use instead:
    Mark such channels where data are read, and leave them out or mask them; standardise with the deviation of a flat
    channel taken as 1.

Known limits:
    Tensors that are mostly 0 or hold few different values (masks, one-hot and sparse features) are not judged. Fewer
    than 32 positions are not either, nor is an axis that may as well be that of time. Signals that move in steps are
    not flat between them, and zeros in all channels at once are silence.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, first_few, places
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.flat:
        return None
    channels = sorted({spot.channel for spot in tensor.flat if spot.channel is not None})
    samples = {(spot.batch, spot.sample) for spot in tensor.flat}
    names = first_few(channels, 6)
    word = tensor.axis if len(channels) == 1 else f"{tensor.axis}s"
    if len(channels) == tensor.num_channels > 1:
        word, names = "all", f"{len(channels)} {tensor.axis}s"
    across = f" in {number_of(len(samples), tensor.num_samples, 'sample')}" if tensor.axis == "channel" else ""
    return Judgement(
        f"{word} {names} of {tensor.name} {'is' if len(channels) == 1 else 'are'} flat{across}",
        evidence={
            "num_flat": len(tensor.flat),
            "first_value": tensor.flat[0].value,
            **({"where": places(tensor.flat)} if across else {}),
        },
        help=("mark flat channels where the data are read, and leave them out or mask them",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH611", "flat-channel", "flat-channel", _judge, judges=DataAudit, severity="warning")

_FLAT = (Spot(0, 1, 13), Spot(0, 2, 13), Spot(1, 0, 5))
FLAGGED = (
    DataAudit(2, (TensorAudit("windows", num_samples=8, num_channels=19, flat=_FLAT),)),
    DataAudit(1, (TensorAudit("x", axis="feature", num_samples=64, flat=(Spot(0, 0, 3, 2.5),)),)),
)
CLEAN = (DataAudit(1, (TensorAudit("windows", num_samples=8, num_channels=19),)), DataAudit(1))
