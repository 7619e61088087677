"""The states of the random generators: put back, they draw the same again."""

import random

import numpy as np
import pytest
import torch

from nanhunt.capture.format import Capture, plain, read_capture, write_capture
from nanhunt.capture.rng import rng_state, set_rng_state


def draws():
    """Some of everything; the odd number of normal draws leaves one cached in Python's and NumPy's generators."""
    return (
        [random.random() for _ in range(3)],
        random.gauss(0.0, 1.0),
        random.getrandbits(100),
        np.random.rand(3).tolist(),  # noqa: NPY002 - the global generator is meant
        np.random.randn(3).tolist(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(5).tolist(),
        torch.nn.functional.dropout(torch.ones(8), 0.5).tolist(),
    )


@pytest.mark.parametrize("warm_up", [0, 1, 700])
def test_a_restored_state_gives_the_same_draws(warm_up):
    for _ in range(warm_up):
        draws()
    state = rng_state()
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first
    set_rng_state(state)
    assert draws() == first


@pytest.mark.parametrize("position", range(len(draws())))
def test_every_generator_is_put_back(position):
    state = rng_state()
    first = draws()[position]
    assert draws()[position] != first
    set_rng_state(state)
    assert draws()[position] == first


def test_a_cached_normal_draw_is_put_back_too():
    random.gauss(0.0, 1.0)
    np.random.randn(1)  # noqa: NPY002
    state = rng_state()
    first = random.gauss(0.0, 1.0), np.random.randn(1).item()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    set_rng_state(state)
    assert (random.gauss(0.0, 1.0), np.random.randn(1).item()) == first  # noqa: NPY002


def numpy_state() -> tuple[list[int], int, int, float]:
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return keys.tolist(), position, has_gauss, cached


MOVES = {
    "nothing": lambda: None,
    "a uniform draw": lambda: np.random.rand(),  # noqa: NPY002
    "one normal draw": lambda: np.random.randn(),  # noqa: NPY002
    "two normal draws": lambda: np.random.randn(2),  # noqa: NPY002
    "a seed": lambda: np.random.seed(3),  # noqa: NPY002
}


@pytest.mark.parametrize("first", MOVES)
@pytest.mark.parametrize("second", MOVES)
def test_numpy_is_seen_to_have_moved(first, second):
    # Drawn from the same seed, one normal number and two leave the same words behind.
    for move in ("a seed", first, second, "nothing", "a seed", second, first):
        MOVES[move]()
        seen = rng_state()["numpy"]
        assert (seen["keys"].tolist(), seen["position"], seen["has_gauss"], seen["cached"]) == numpy_state()


def test_reading_the_state_draws_nothing():
    rng_state()
    first = draws()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    for _ in range(3):
        rng_state()
    assert draws() == first


def test_a_state_survives_the_file(tmp_path):
    whole = Capture({"step": 0}, plain({"rng": rng_state()}))
    first = draws()
    set_rng_state(read_capture(write_capture(whole, tmp_path)).payload["rng"])
    assert draws() == first


def test_the_state_does_not_move_with_the_generators():
    state = rng_state()
    first = draws()
    draws()
    set_rng_state(state)
    assert draws() == first
