"""What surrounds a step and decides its last bits: versions, threads, vector instructions, autocast."""

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanhunt.observe.ranks import rank

# What differs most often between two machines, and how to say it.
_COMPARED = {"torch": "torch", "vector_instructions": "vector instructions", "processor": "processor"}


def environment() -> dict[str, Any]:
    """What a replay must match to be bit-identical."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "flush_denormal": bool(torch.tensor(1e-40, dtype=torch.float32).mul(1.0).item() == 0.0),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "rank": rank(),
        "command": " ".join(Path(part).name if position == 0 else part for position, part in enumerate(sys.argv)),
    }


def differences(captured: Mapping[str, Any]) -> str:
    """How this process differs from the captured one, as ``torch 2.4 there, 2.13 here``; empty if it does not."""
    here = environment()
    parts = [
        f"{name} {captured[key]} there, {here[key]} here"
        for key, name in _COMPARED.items()
        if key in captured and captured[key] != here[key]
    ]
    return "; ".join(parts)


def autocast_state() -> dict[str, Any]:
    """Which device type is under autocast, and its dtype; empty if none is."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return {"device": device, "dtype": str(torch.get_autocast_dtype(device)).removeprefix("torch.")}
    return {}
