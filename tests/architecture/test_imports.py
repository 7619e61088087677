"""What starts without torch, and which way imports run."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy", "edfio")


def heavy_modules(code: str) -> list[str]:
    """The large packages that are loaded after ``code`` ran in a process of its own."""
    report = f"import sys; print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("loaded:")
    return last.split()[1:]


def verb(*args: str) -> str:
    """Runs a verb as the installed program does, entry points of other packages included."""
    return f"import sys; sys.argv = {['nanhunt', *args]!r}\nfrom nanhunt.cli.app import app; app(standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        "import nanhunt",
        "from nanhunt import CaptureError, NanhuntError, NonFiniteStep, TargetError",
        "import nanhunt.rules.registry, nanhunt.reports, nanhunt.findings, nanhunt.numerics, nanhunt.records.steps",
        verb("rules"),
        verb("explain", "NH203"),
        verb("train", "--help"),
        verb("replay", "--help"),
    ],
)
def test_this_starts_without_torch(code):
    assert heavy_modules(code) == []


def test_the_check_can_fail():
    assert heavy_modules("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]
    assert heavy_modules("import edfio") == ["edfio"]


def test_what_needs_torch_loads_it_when_it_is_asked_for():
    assert "torch" in heavy_modules("import nanhunt; nanhunt.read_capture")


def test_every_public_name_is_there():
    import nanhunt

    assert all(getattr(nanhunt, name) is not None for name in nanhunt.__all__)
    with pytest.raises(AttributeError, match="module 'nanhunt' has no attribute 'wacth'"):
        _ = nanhunt.wacth
