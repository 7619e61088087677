"""Costs compared on a machine that others use too: interleaved rounds, CPU time, ratios formed inside a round.

A machine that slows down for a while slows all runs of a round alike, so the ratio to the base run of the same round
stays. Running the base itself as one of the others shows what is left as noise.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process that the call takes."""
    started = time.process_time()
    run()
    return time.process_time() - started


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; all the same for a single value."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    base: Callable[[], float],
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    say: Callable[[int], None] = lambda number: None,
) -> tuple[list[float], dict[str, list[float]]]:
    """What the base measured, and each run as a multiple of the base: one ratio per run and round.

    Every round has a random order of its own, and the base is run before and after each of the runs: a ratio is to the
    mean of its two neighbours, so that neither a slow spell nor a drift gets into it.

    Args:
        base: What the others are compared with. Like them it measures itself, so that what it prepares and clears away
            can be left out.
        runs: The others, by name.
        rounds: How often.
        say: Told the number of each round, from 0, before it begins.
    """
    of_base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        say(number)
        order = list(runs)
        random.shuffle(order)
        of_base.append(base())
        for name in order:
            value = runs[name]()
            of_base.append(base())
            ratios[name].append(value / statistics.mean(of_base[-2:]))
    return of_base, ratios
