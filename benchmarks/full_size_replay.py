"""A complete replay of a full-size capture: wall time and peak memory, each run in a process of its own.

Trains the preset ``incident`` until a step fails by itself, then replays its capture.

    python benchmarks/full_size_replay.py [--seed 2] [--steps 60] [--folder FOLDER]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(*command: str) -> tuple[float, int]:
    """Wall seconds and exit code of the nanhunt program."""
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "nanhunt.cli.app", *command], check=False).returncode
    return time.perf_counter() - started, code


def main() -> None:
    """Trains, replays, and prints what the replay took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default="2")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="nanhunt-full-"))
    captures = sorted(folder.glob("bad_batch_*.pt"))
    if not captures:
        seconds, code = run(
            *("train", "--preset", "incident", "--seed", options.seed, "--steps", options.steps),
            *("--trace-finite", "--out", str(folder)),
        )
        print(f"training ended with exit code {code} after {seconds:.0f} s")
        captures = sorted(folder.glob("bad_batch_*.pt"))
    if not captures:
        sys.exit(f"no step failed within {options.steps} steps of seed {options.seed}; try another seed")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    seconds, code = run("replay", str(captures[0]))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    size = captures[0].stat().st_size / 1e6
    note = "" if peak > before else " (the training's; the replay stayed below it)"
    taken = f"{seconds:.1f} s, exit code {code}, peak {peak / 2**20:.2f} GiB{note}"
    print(f"replay of {captures[0].name} ({size:.0f} MB): {taken}")


if __name__ == "__main__":
    main()
