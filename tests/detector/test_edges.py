"""Similarity, edge weights and the graph made of them."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from detector.config import PRESETS
from detector.edges import EdgeStream, assemble_adjacency, pairwise_cosine

SMALL = PRESETS["small"].model


def test_similarity_matches_float64_pair_by_pair():
    torch.manual_seed(0)
    nodes = torch.randn(2, 3, 19, 16)
    pairs = [(i, j) for i in range(19) for j in range(i + 1, 19)]
    wide = nodes.double()
    expected = torch.stack([F.cosine_similarity(wide[:, :, i], wide[:, :, j], dim=-1) for i, j in pairs], dim=1)

    similarity = pairwise_cosine(nodes)

    assert len(pairs) == 171
    assert similarity.shape == (2, 171, 3)
    torch.testing.assert_close(similarity.double(), expected, rtol=0, atol=5e-5)
    assert similarity.abs().max() <= 1


def test_pairs_are_the_upper_triangle_row_by_row():
    nodes = torch.zeros(1, 1, 3, 2)
    nodes[0, 0] = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    assert pairwise_cosine(nodes)[0, :, 0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-3)


def test_zero_nodes_have_zero_similarity_and_a_finite_gradient():
    nodes = torch.randn(1, 4, 19, 8)
    nodes[:, :, :5] = 0
    nodes.requires_grad_()

    similarity = pairwise_cosine(nodes)
    similarity.sum().backward()

    assert (similarity[:, :18] == 0).all()  # the pairs of node 0
    assert nodes.grad.isfinite().all()
    assert nodes.grad.abs().max() <= 18 * 100 * (1 + 1e-4)  # 18 pairs, gain 1 / sqrt(eps)


def test_similarity_is_float32_under_autocast():
    nodes = 300 * torch.randn(1, 2, 19, 8)  # squares overflow float16

    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = pairwise_cosine(nodes.bfloat16())

    assert similarity.dtype == torch.float32
    assert similarity.isfinite().all()


def test_weights_are_positive_and_depend_on_the_magnitude_of_similarity():
    torch.manual_seed(0)
    stream = EdgeStream(SMALL)
    levels = torch.linspace(0.1, 1.0, 10).view(1, 10, 1).expand(1, 10, 40)

    weights = stream(levels)

    assert weights.shape == (1, 10, 40)
    assert (weights > 0).all()
    steady = weights[0, :, 20]
    assert all(abs(a - b) > 1e-4 for a, b in pairwise(steady.tolist()))


def adjacency_by_loop(weights: torch.Tensor, num_nodes: int, top_k: int, threshold: float) -> torch.Tensor:
    dense = torch.zeros(num_nodes, num_nodes)
    pairs = [(i, j) for i in range(num_nodes) for j in range(i + 1, num_nodes)]
    for (i, j), weight in zip(pairs, weights.tolist(), strict=True):
        dense[i, j] = dense[j, i] = weight
    kept = torch.zeros_like(dense)
    for i in range(num_nodes):
        for j in sorted(range(num_nodes), key=lambda j: -dense[i, j].item())[:top_k]:
            if dense[i, j] > threshold:
                kept[i, j] = dense[i, j]
    return (kept + kept.T) / 2


@pytest.mark.parametrize(("top_k", "threshold"), [(3, 1e-4), (1, 0.0), (18, 0.5)])
def test_adjacency_matches_a_plain_loop(top_k, threshold):
    torch.manual_seed(0)
    weights = torch.rand(2, 171, 4)

    adjacency = assemble_adjacency(weights, num_nodes=19, top_k=top_k, threshold=threshold)

    assert adjacency.shape == (2, 4, 19, 19)
    for b in range(2):
        for t in range(4):
            torch.testing.assert_close(adjacency[b, t], adjacency_by_loop(weights[b, :, t], 19, top_k, threshold))
    assert torch.equal(adjacency, adjacency.mT)
    assert (adjacency.diagonal(dim1=-2, dim2=-1) == 0).all()


def test_weights_below_the_threshold_leave_an_empty_graph_and_no_gradient():
    weights = torch.full((1, 171, 2), 1e-5, requires_grad=True)

    adjacency = assemble_adjacency(weights, num_nodes=19, top_k=3, threshold=1e-4)
    adjacency.sum().backward()

    assert (adjacency == 0).all()
    assert (weights.grad == 0).all()


def test_kept_edges_pass_their_gradient():
    torch.manual_seed(0)
    weights = torch.rand(1, 171, 1, requires_grad=True)

    assemble_adjacency(weights, num_nodes=19, top_k=3, threshold=1e-4).sum().backward()

    # Kept by both of its nodes an edge counts twice, by one once, else not at all.
    assert set(weights.grad.unique().tolist()) == {0.0, 1.0, 2.0}
    assert weights.grad.sum() == 19 * 3
