"""Time and memory of one full-size V3 training step on the CPU.

Forward, focal loss and backward of preset ``v3``; no optimizer step, no data loading. Synthetic noise as input.

    python benchmarks/v3_step.py [--preset v3] [--batch 1] [--seconds 60] [--repeats 9] [--threads 2]

The minimum is the figure to compare when other work shares the machine; the load average is printed to judge that.
"""

import argparse
import os
import resource
import time

import torch
from interleaved import quartiles

from detector.config import FS_HZ, PRESETS
from detector.losses import focal_loss
from detector.model import SeizureDetector
from nanhunt.memory import keep_freed_memory

NUM_WARM_UPS = 2


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="v3")
    parser.add_argument("--batch", type=int, default=1, help="windows per step")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a window")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps after two warm-up steps")
    parser.add_argument("--threads", type=int, default=2, help="threads of one operation")
    return parser.parse_args()


def peak_memory_mib() -> float:
    """Largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def timed_step(model: SeizureDetector, windows: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Seconds of the forward pass with the loss, and of both passes."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = focal_loss(model(windows), labels, alpha=0.5, gamma=2.0)
    middle = time.perf_counter()
    loss.backward()
    return middle - start, time.perf_counter() - start


def table_row(name: str, seconds: list[float]) -> str:
    """Minimum, quartiles and median, in milliseconds."""
    low, median, high = quartiles(seconds)
    return f"{name:18s}" + "".join(f"{1e3 * value:12.0f}" for value in (min(seconds), low, median, high))


def main() -> None:
    """Runs the benchmark and prints a table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `nanhunt train` does
    torch.manual_seed(0)
    model = SeizureDetector(PRESETS[arguments.preset].model)
    samples = round(arguments.seconds * FS_HZ)
    windows = torch.randn(arguments.batch, 19, samples)
    labels = (torch.rand(arguments.batch, samples) < 0.1).float()
    before_mib = peak_memory_mib()
    timings = [timed_step(model, windows, labels) for _ in range(NUM_WARM_UPS + arguments.repeats)][NUM_WARM_UPS:]
    forward, both = (list(column) for column in zip(*timings, strict=True))

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"preset {arguments.preset}, input {tuple(windows.shape)}, {num_parameters:,} parameters")
    print(f"torch {torch.__version__}, {arguments.threads} threads, load average {os.getloadavg()[0]:.2f}")
    print(f"{'ms':18s}{'min':>12s}{'quartile 1':>12s}{'median':>12s}{'quartile 3':>12s}")
    print(table_row("forward", forward))
    print(table_row("forward + backward", both))
    print(f"peak memory growth {peak_memory_mib() - before_mib:,.0f} MiB")


if __name__ == "__main__":
    main()
