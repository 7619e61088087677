"""unnormalised-image: images hold whole numbers from 0 to 255 as floating-point numbers.

What it does:
    Looks at floating-point tensors of four axes with one, three or four colours whose values are all whole numbers
    between 0 and 255, some of them above 128.

Why it matters:
    Networks are made for inputs of deviation 1. These are some 70 times as large, and so are the first gradients.

Use instead:
    ``x / 255``, and the mean and deviation of the data set.

Known limits:
    A model that scales its input itself gets what it asks for. Integer tensors are not judged: they have to be
    converted anyway.
"""

from nanhunt.findings import Location
from nanhunt.records.data_audit import DataAudit, TensorAudit
from nanhunt.rules.data_words import for_each_tensor
from nanhunt.rules.registry import Judgement, Outcome, Rule


def _look(tensor: TensorAudit) -> Judgement | None:
    if not tensor.is_pixels:
        return None
    return Judgement(
        f"{tensor.name} holds whole numbers from {tensor.low:g} to {tensor.high:g}, as {tensor.dtype}",
        evidence={"mean": tensor.mean, "std": tensor.std},
        notes=("no fault where the model scales its input itself",),
        help=("divide by 255, and standardise",),
        location=Location("data", tensor=tensor.name),
    )


def _judge(audit: DataAudit) -> Outcome:
    return for_each_tensor(_look)(audit)


RULE = Rule("NH619", "unnormalised-image", "unnormalised-image", _judge, judges=DataAudit, severity="warning")

_IMAGE = TensorAudit("x", num_samples=8, num_channels=3, low=0.0, high=255.0, mean=120.0, std=70.0, is_pixels=True)
FLAGGED = (DataAudit(1, (_IMAGE,)),)
CLEAN = (DataAudit(1, (TensorAudit("x", low=0.0, high=1.0),)), DataAudit(1))
