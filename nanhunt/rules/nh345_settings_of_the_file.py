"""settings-of-the-file: the groups in the file have other settings than the target's optimizer.

What it does:
    Compares ``betas``, ``eps``, ``weight_decay``, ``momentum``, the rate the optimizer was made with, and the switches
    of each group. The current rate is left out, for the schedule moves it.

Why it matters:
    ``optimizer.load_state_dict`` puts the file's settings in place of those the script has just made. A change of the
    configuration between two runs is then without effect, and nothing says so.

Use instead:
    Set the groups again after loading, or take the configuration that the file was written with.
"""

from nanhunt.findings import Location
from nanhunt.numerics import count
from nanhunt.records.optimizer_audit import SettingsComparison
from nanhunt.rules.registry import Judgement, Rule


def _judge(settings: SettingsComparison) -> Judgement | None:
    if not settings.differing:
        return None
    name, here, there = settings.differing[0]
    others = len(settings.differing) - 1
    return Judgement(
        f"{name} is {_text(here)} in the file and {_text(there)} in the target",
        evidence={name: [here, there] for name, here, there in settings.differing[:4]},
        notes=(
            "loading the state puts the file's settings in place of the target's",
            *((f"{count(others, 'more setting differs', 'more settings differ')}",) if others else ()),
        ),
        help=("set the groups again after load_state_dict, or take the file's configuration",),
        location=Location("optimizer"),
    )


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


RULE = Rule("NH345", "settings-of-the-file", "settings-of-the-file", _judge, SettingsComparison, "warning")

FLAGGED = (SettingsComparison((("eps of group 0", 1e-8, 1e-6),)),)
CLEAN = (SettingsComparison(),)
