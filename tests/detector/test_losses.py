"""Focal loss against its formula in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.losses import focal_loss

LARGEST = torch.finfo(torch.float32).max


def by_formula(logit: float, label: int, alpha: float, gamma: float) -> float:
    """One element in double precision, from the definition; for moderate logits."""
    p = 1 / (1 + math.exp(-logit))
    p_t, alpha_t = (p, alpha) if label else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-15, 15, width=32), min_size=1, max_size=8),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    gamma=st.sampled_from([0.0, 1.0, 2.0, 5.0]),
    ones=st.integers(0, 255),
)
def test_value_is_the_formula(logits, alpha, gamma, ones):
    labels = [ones >> i & 1 for i in range(len(logits))]
    terms = [by_formula(logit, label, alpha, gamma) for logit, label in zip(logits, labels, strict=True)]

    loss = focal_loss(torch.tensor([logits]), torch.tensor([labels]), alpha=alpha, gamma=gamma)

    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    logit=st.floats(-LARGEST, LARGEST, width=32),
    label=st.sampled_from([0, 1]),
    gamma=st.sampled_from([0.0, 0.5, 2.0, 5.0]),
)
def test_value_and_gradient_are_finite_for_every_finite_logit(logit, label, gamma):
    logits = torch.full((2, 3), logit, requires_grad=True)

    loss = focal_loss(logits, torch.full((2, 3), label), alpha=0.5, gamma=gamma)
    loss.backward()

    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("logit", [-LARGEST, -1000.0, -88.8, -0.0, 88.8, 1000.0, LARGEST])
@pytest.mark.parametrize("label", [0, 1])
def test_gradient_matches_float64_at_the_extremes(logit, label):
    wide = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    narrow = torch.tensor([[logit]], requires_grad=True)
    labels = torch.tensor([[label]])

    focal_loss(wide, labels, alpha=0.5, gamma=2.0).backward()
    focal_loss(narrow, labels, alpha=0.5, gamma=2.0).backward()

    assert narrow.grad.item() == pytest.approx(wide.grad.item(), rel=1e-5, abs=1e-37)


def test_zero_logits_cost_an_eighth_of_log_two():
    loss = focal_loss(torch.zeros(4, 16), torch.ones(4, 16), alpha=0.5, gamma=2.0)

    assert loss.item() == pytest.approx(math.log(2) / 8, rel=1e-6)


@pytest.mark.parametrize("where", ["logits", "labels"])
def test_a_nan_is_not_hidden(where):
    tensors = {"logits": torch.zeros(1, 4), "labels": torch.zeros(1, 4)}
    tensors[where][0, 2] = math.nan

    assert focal_loss(tensors["logits"], tensors["labels"], alpha=0.5, gamma=2.0).isnan()


def test_reduced_in_float32():
    assert focal_loss(torch.zeros(1, 4).half(), torch.zeros(1, 4), alpha=0.5, gamma=2.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "labels", "alpha", "gamma", "message"),
    [
        ((1, 4), (4, 1), 0.5, 2.0, "must agree"),
        ((0, 4), (0, 4), 0.5, 2.0, "hold data"),
        ((1, 4), (1, 4), 1.5, 2.0, "alpha must be 0 to 1"),
        ((1, 4), (1, 4), 0.5, -1.0, "gamma >= 0"),
    ],
)
def test_misuse_is_refused(logits, labels, alpha, gamma, message):
    with pytest.raises(ValueError, match=message):
        focal_loss(torch.zeros(logits), torch.zeros(labels), alpha=alpha, gamma=gamma)
