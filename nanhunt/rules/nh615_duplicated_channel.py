"""duplicated-channel: channels of a sample are copies of each other, up to a factor.

What it does:
    Correlates the channels of each sample of a waveform. It holds where two that are not flat agree to one part in a
    thousand million.

Why it matters:
    Bridged electrodes, a channel read twice, or a reference subtracted from itself. In graphs built from correlations
    two equal nodes tie eigenvalues, and the gradient of eigenvectors at a tie is infinite (NH203).

Use instead:
    Leave out all but one, or take the average as one channel.

Known limits:
    Mono sound stored as stereo is reported: its second channel is a copy. Waveforms of at most 256 channels and at
    least 64 positions are looked at; grey images stored in three colours are not.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Pair, Spot, TensorAudit
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.equal_channels:
        return None
    pair = tensor.equal_channels[0]
    samples = {(pair.first.batch, pair.first.sample) for pair in tensor.equal_channels}
    kinds = sorted({(pair.first.channel, pair.second.channel) for pair in tensor.equal_channels}, key=str)
    factor = "" if abs(pair.ratio - 1) < 1e-6 else f" times {pair.ratio:.6g}"
    return Judgement(
        f"channel {pair.second.channel} of {tensor.name} is channel {pair.first.channel}{factor} in"
        f" {number_of(len(samples), tensor.num_samples, 'sample')}, first {pair.first.text}",
        evidence={"num_pairs": len(kinds), "pairs": [list(kind) for kind in kinds[:8]]},
        help=("leave out all but one of them",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH615", "duplicated-channel", "duplicated-channel", _judge, judges=DataAudit, severity="warning")

_PAIR = Pair(Spot(0, 1, 3), Spot(0, 1, 7), 2.0)
FLAGGED = (DataAudit(1, (TensorAudit("x", num_samples=4, num_channels=19, equal_channels=(_PAIR,)),)),)
CLEAN = (DataAudit(1, (TensorAudit("x", num_samples=4, num_channels=19),)), DataAudit(1))
