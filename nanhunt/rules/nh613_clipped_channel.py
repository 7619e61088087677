"""clipped-channel: a waveform stays at its largest value.

What it does:
    Looks at channels of at least 64 positions. It holds where more than 1 % of the values, at least 8 of them and 3 in
    a row, are exactly the largest one, while the values below it move.

Why it matters:
    An amplifier or a converter ran against its rail: the shape is lost there, and what is left has edges at all
    frequencies.

Use instead:
    Look at the range of the recording; mark or leave out such stretches.

Known limits:
    Signals that move in steps, hold few levels, or only have a floor (log spectrograms) do not count; so a signal that
    is clipped below and not above is missed. Images are not judged: white is common.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, places
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.clipped:
        return None
    worst = max(tensor.clipped, key=lambda spot: spot.share)
    samples = {(spot.batch, spot.sample) for spot in tensor.clipped}
    return Judgement(
        f"{tensor.name} stays at its largest value in {number_of(len(samples), tensor.num_samples, 'sample')}:"
        f" {worst.share:.1%} of channel {worst.channel} of {worst.text} is {worst.value:.6g}",
        evidence={"num_clipped": len(tensor.clipped), "where": places(tensor.clipped)},
        help=("look at the range of the recording there; mark or leave out such stretches",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH613", "clipped-channel", "clipped-channel", _judge, judges=DataAudit, severity="warning")

FLAGGED = (DataAudit(1, (TensorAudit("audio", num_samples=4, clipped=(Spot(0, 1, 0, 1.0, 0.12),)),)),)
CLEAN = (DataAudit(1, (TensorAudit("audio", num_samples=4),)), DataAudit(1))
