"""mostly-padded-sample: less than 2 % of a sample is anything else than zeros at its end.

What it does:
    Looks at waveforms for samples that are 0 in all channels, from either end, but for less than 2 % of their length.

Why it matters:
    A few positions are too few for any statistic over the sample: correlations between channels are of +1 or -1 or do
    not exist, and normalising by the deviation divides by next to nothing. Usual reason: the last window of a
    recording, filled up with zeros.

Use instead:
    Leave out such windows, or let the last one begin earlier.

Known limits:
    Where the batch has a mask or lengths, which tell the model what is padding, this is not judged.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, Spot, TensorAudit, places
from nanhunt.rules.data_words import for_each_tensor, number_of
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.padded:
        return None
    worst = min(tensor.padded, key=lambda spot: spot.value)
    return Judgement(
        f"{number_of(len(tensor.padded), tensor.num_samples, 'sample')} of {tensor.name}"
        f" {'holds' if len(tensor.padded) == 1 else 'hold'} hardly more than zeros:"
        f" {worst.value:.0f} positions are left of {worst.text}",
        evidence={"num_padded": len(tensor.padded), "where": places(tensor.padded)},
        help=("leave out such windows, or let the last one begin earlier",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return None if audit.has_lengths else for_each_tensor(_look)(audit)


RULE = Rule("NH624", "mostly-padded-sample", "mostly-padded-sample", _judge, judges=DataAudit, severity="warning")

_X = TensorAudit("windows", num_samples=4, padded=(Spot(0, 0, None, 27.0, 0.989),))
FLAGGED = (DataAudit(1, (_X,)),)
CLEAN = (DataAudit(1, (_X,), has_lengths=True), DataAudit(1, (TensorAudit("windows", num_samples=4),)), DataAudit(1))
