"""Writes the legacy form of a capture: the batch and the step number, and nothing else.

That is what the original trainer saved: a dictionary of ``windows``, ``labels`` and ``global_step``. The values are
those of the capture, untouched.

    python bad_batches/make_legacy.py bad_batches/bad_batch_000019.pt bad_batches/legacy_bad_batch_000019.pt
"""

import sys
from pathlib import Path

import torch

import nanhunt


def main() -> None:
    """Converts the file named first into the one named second."""
    source, wanted = Path(sys.argv[1]), Path(sys.argv[2])
    capture = nanhunt.read_capture(source)
    (batch,) = capture.batches
    legacy = {"windows": batch["windows"], "labels": batch["labels"], "global_step": capture.step}
    torch.save(legacy, wanted)


if __name__ == "__main__":
    main()
