"""nanhunt finds the operation that made a PyTorch training step non-finite, and tests its explanation.

>>> with nanhunt.watch(model, optimizer, out_dir="debug"):
...     train()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nanhunt.errors import CaptureError, NanhuntError, NonFiniteStep, TargetError

if TYPE_CHECKING:
    from nanhunt.audit.data import audit_data
    from nanhunt.audit.dtype import audit_dtype
    from nanhunt.audit.init import audit_init
    from nanhunt.audit.optimizer import audit_optimizer
    from nanhunt.capture.format import Capture, read_capture
    from nanhunt.capture.watch import Fault, Watch, watch
    from nanhunt.compare import Comparison, compare_compiled
    from nanhunt.experiments.replay import replay
    from nanhunt.hunt import Hunt, trace
    from nanhunt.reports import save_report

# Served on first use, so that what needs no torch starts without it.
_LAZY = {
    "audit_data": "nanhunt.audit.data",
    "audit_dtype": "nanhunt.audit.dtype",
    "audit_init": "nanhunt.audit.init",
    "audit_optimizer": "nanhunt.audit.optimizer",
    "Capture": "nanhunt.capture.format",
    "read_capture": "nanhunt.capture.format",
    "Fault": "nanhunt.capture.watch",
    "Watch": "nanhunt.capture.watch",
    "watch": "nanhunt.capture.watch",
    "Comparison": "nanhunt.compare",
    "compare_compiled": "nanhunt.compare",
    "replay": "nanhunt.experiments.replay",
    "Hunt": "nanhunt.hunt",
    "trace": "nanhunt.hunt",
    "save_report": "nanhunt.reports",
}

__all__ = [
    "Capture",
    "CaptureError",
    "Comparison",
    "Fault",
    "Hunt",
    "NanhuntError",
    "NonFiniteStep",
    "TargetError",
    "Watch",
    "audit_data",
    "audit_dtype",
    "audit_init",
    "audit_optimizer",
    "compare_compiled",
    "read_capture",
    "replay",
    "save_report",
    "trace",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nanhunt' has no attribute {name!r}")
