"""decayed-norm-or-bias: weight decay acts on norm gains, biases or other vectors.

What it does:
    Lists trainable norm gains and offsets, biases and other 1-d parameters that are in a group with weight decay. What
    a parameter is follows from the type of its module: a norm called ``seq.1`` is one, a ``Linear`` called ``dbnet``
    is not. A module of a foreign class is a norm if a copy of it gives the same for ``x`` and ``64 x``; where it
    cannot be called with one tensor, the name of its class decides, and the evidence says so.

Why it matters:
    It is hygiene. Decay on a matrix that a norm follows does not change what the layer can express; a gain, an offset
    or a rate is pulled towards 0, where it has no reason to be. The pull is slow, and the message says how slow. It
    cannot make a value non-finite: a gain of exactly 0 has a finite forward and backward pass. Only where rate times
    decay exceeds 2 does it diverge, which is another rule.

Use instead:
    Two groups, with ``weight_decay=0.0`` for everything that is not the weight of a linear map or a convolution.

Known limits:
    Gains that are stored as their distance from 1 are listed as well, though decay pulls those towards the identity.
    Matrices that stand in a module of no known type, such as a positional embedding, are not judged.
"""

from collections import Counter

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import GroupFacts, OptimizerSetup, ParameterFacts, some
from nanhunt.rules.registry import Judgement, Rule


def _judge(setup: OptimizerSetup) -> Judgement | None:
    found = [one for one in setup.decayed("norm gain", "norm bias", "bias", "1-d") if not one.asks_no_decay]
    if not found:
        return None
    roles = Counter(one.role for one in found)
    plurals = {"norm bias": "norm biases", "bias": "biases", "1-d": "other vectors"}
    singular = {"1-d": "other vector"}
    named = [count(number, singular.get(role, role), plurals.get(role, "")) for role, number in sorted(roles.items())]
    guessed = [one.name for one in found if one.inferred == "the name of its class"]
    return Judgement(
        f"weight decay of {max(setup.decay_of(one) for one in found):g} acts on {', '.join(named)}",
        evidence={"num_decayed": len(found), "first": some([one.name for one in found])},
        notes=(
            *setup.decay_notes(found),
            *([f"taken for norms by the name of their class only: {some(guessed)}"] if guessed else []),
        ),
        help=("put them into a group with weight_decay=0.0",),
        location=Location("optimizer", tensor=found[0].name),
    )


RULE = Rule("NH320", "decayed-norm-or-bias", "decayed-norm-or-bias", _judge, OptimizerSetup, "warning")

_DECAYED = GroupFacts(0, 1e-4, 0.05, decay="direct", peak_lr=1e-4, kept_share=0.951)
_GROUPS = (_DECAYED, GroupFacts(1, 1e-4, 0.0))


def _setup(*parameters: ParameterFacts) -> OptimizerSetup:
    return OptimizerSetup("AdamW", _GROUPS, parameters)


FLAGGED = (
    _setup(ParameterFacts("seq.1.weight", "LayerNorm", "norm gain", shape=(8,), groups=(0,))),
    _setup(ParameterFacts("head.bias", "Linear", "bias", shape=(8,), groups=(0,))),
)
CLEAN = (
    _setup(ParameterFacts("dbnet.weight", "Linear", "matrix", shape=(8, 8), groups=(0,))),
    _setup(ParameterFacts("seq.1.weight", "LayerNorm", "norm gain", shape=(8,), groups=(1,))),
    _setup(ParameterFacts("seq.1.weight", "LayerNorm", "norm gain", shape=(8,), groups=(0,), requires_grad=False)),
)
