"""Laplacian, positional encoding and graph convolution against closed forms and an independent implementation."""

import math
from dataclasses import replace

import pytest
import torch

from detector import graph
from detector.config import PRESETS, V3, ModelConfig
from detector.graph import GraphStack, LaplacianPositionalEncoding, SSGConv, normalized_laplacian


def complete_graph(num_nodes: int = 19, weight: float = 1.0) -> torch.Tensor:
    return weight * (torch.ones(num_nodes, num_nodes) - torch.eye(num_nodes))


def path_graph(num_nodes: int) -> torch.Tensor:
    adjacency = torch.zeros(num_nodes, num_nodes)
    for i in range(num_nodes - 1):
        adjacency[i, i + 1] = adjacency[i + 1, i] = 1
    return adjacency


def random_graphs(*batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    half = torch.rand(*batch, 19, 19, generator=generator).triu(1)
    return half + half.mT


def encoding(**changes: object) -> LaplacianPositionalEncoding:
    return LaplacianPositionalEncoding(replace(V3.model, **changes))


def test_laplacian_of_a_path_has_the_known_spectrum():
    eigenvalues = torch.linalg.eigvalsh(normalized_laplacian(path_graph(19)).double())

    expected = [1 - math.cos(math.pi * k / 18) for k in range(19)]
    torch.testing.assert_close(eigenvalues, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [1e-4, 1.0, 1e4])
def test_laplacian_of_a_complete_graph_ignores_its_weight(weight):
    laplacian = normalized_laplacian(complete_graph(weight=weight))

    torch.testing.assert_close(laplacian, torch.eye(19) - complete_graph() / 18, rtol=0, atol=1e-6)


def test_a_node_without_edges_has_an_identity_row_and_a_finite_gradient():
    adjacency = path_graph(5)
    adjacency[4] = adjacency[:, 4] = 0
    adjacency.requires_grad_()

    laplacian = normalized_laplacian(adjacency)
    laplacian.square().sum().backward()

    assert laplacian[4].tolist() == [0, 0, 0, 0, 1]
    assert adjacency.grad.isfinite().all()


def test_an_empty_graph_is_the_identity():
    assert torch.equal(normalized_laplacian(torch.zeros(2, 19, 19)), torch.eye(19).expand(2, 19, 19))


def test_encoding_holds_the_smallest_eigenvectors_with_their_sign_fixed():
    adjacency = random_graphs(2, 3)
    laplacian = normalized_laplacian(adjacency).double()

    vectors = encoding()(adjacency).double()

    assert vectors.shape == (2, 3, 19, 16)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(16).double().expand(2, 3, 16, 16), rtol=0, atol=1e-5)
    values = torch.linalg.eigvalsh(laplacian)[..., :16]
    torch.testing.assert_close(laplacian @ vectors, vectors * values.unsqueeze(-2), rtol=0, atol=1e-5)
    assert (vectors.sum(-2) >= 0).all()


def test_the_sign_does_not_depend_on_what_eigh_returns(monkeypatch):
    adjacency = random_graphs(1, 1)
    expected = encoding()(adjacency)
    original = torch.linalg.eigh
    monkeypatch.setattr(graph.torch.linalg, "eigh", lambda matrix: (original(matrix)[0], -original(matrix)[1]))

    assert torch.equal(encoding()(adjacency), expected)


@pytest.mark.parametrize("interval", [1, 4, 7])
def test_the_interval_saves_decompositions_and_holds_the_encoding(interval, monkeypatch):
    adjacency = random_graphs(2, 10)
    every_step = encoding()(adjacency)
    counted = []
    original = torch.linalg.eigh
    monkeypatch.setattr(
        graph.torch.linalg, "eigh", lambda matrix: counted.append(matrix.shape[:2].numel()) or original(matrix)
    )

    held = encoding(semi_dynamic_interval=interval)(adjacency)

    assert counted == [2 * math.ceil(10 / interval)]
    assert held.shape == every_step.shape
    expected = every_step[:, [t - t % interval for t in range(10)]]
    torch.testing.assert_close(held, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interval", [1, 3])
def test_detached_encoding_has_no_path_to_the_adjacency(interval):
    adjacency = random_graphs(1, 4).requires_grad_()

    assert not encoding(pe_gradient="detached", semi_dynamic_interval=interval)(adjacency).requires_grad


@pytest.mark.parametrize("interval", [1, 3])
def test_gradient_through_eigh_is_finite_where_eigenvalues_differ(interval):
    adjacency = random_graphs(1, 4).requires_grad_()
    vectors = encoding(pe_gradient="through_eigh", semi_dynamic_interval=interval)(adjacency)

    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()

    assert adjacency.grad.isfinite().all()
    assert adjacency.grad.abs().max() > 0


@pytest.mark.parametrize("shift", [0.0, 1e-5, 1e-3])
def test_gradient_through_eigh_is_non_finite_on_a_complete_graph_whatever_the_shift(shift):
    adjacency = complete_graph(weight=0.7).view(1, 1, 19, 19).requires_grad_()
    vectors = encoding(pe_gradient="through_eigh", laplacian_shift=shift)(adjacency)
    assert vectors.isfinite().all()

    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()

    assert not adjacency.grad.isfinite().all()


def test_gradient_through_eigh_matches_finite_differences():
    adjacency = random_graphs(1, 1).requires_grad_()
    direction = torch.randn(19, 19, generator=torch.Generator().manual_seed(0))
    direction = direction + direction.T
    weights = torch.linspace(-1, 1, 19 * 16).view(19, 16)
    module = encoding(pe_gradient="through_eigh")

    (module(adjacency)[0, 0] * weights).sum().backward()

    step = 1e-3
    with torch.no_grad():
        values = [(module(adjacency + sign * step * direction)[0, 0] * weights).sum() for sign in (1, -1)]
    numerical = ((values[0] - values[1]) / (2 * step)).item()
    assert (adjacency.grad[0, 0] * direction).sum().item() == pytest.approx(numerical, rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pe_dim": 20}, "pe_dim must be 1 to 19"),
        ({"semi_dynamic_interval": 0}, "semi_dynamic_interval must be 1 or more"),
        ({"pe_gradient": "sometimes"}, "'detached' or 'through_eigh'"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        encoding(**changes)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_convolution_equals_torch_geometric_with_gradients(hops):
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    ours = SSGConv(6, 5, alpha=0.05, hops=hops).double()
    theirs = geometric.SSGConv(6, 5, alpha=0.05, K=hops).double()
    theirs.lin.load_state_dict(ours.linear.state_dict())
    adjacency = (torch.rand(7, 7) * (torch.rand(7, 7) < 0.5)).double().fill_diagonal_(0).requires_grad_()
    features = torch.randn(7, 6).double()
    target, source = adjacency.detach().nonzero(as_tuple=True)
    edge_weight = adjacency.detach()[target, source].requires_grad_()

    expected = theirs(features, torch.stack([source, target]), edge_weight)
    actual = ours(features, adjacency)

    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    expected.sin().sum().backward()
    actual.sin().sum().backward()
    torch.testing.assert_close(adjacency.grad[target, source], edge_weight.grad, rtol=1e-6, atol=1e-7)


def test_an_empty_graph_lets_features_through():
    conv = SSGConv(6, 6, alpha=0.05, hops=2)
    torch.nn.init.eye_(conv.linear.weight)
    features, adjacency = torch.randn(2, 19, 6), torch.zeros(2, 19, 19, requires_grad=True)

    output = conv(features, adjacency)
    output.sum().backward()

    torch.testing.assert_close(output, features)
    assert adjacency.grad.isfinite().all()


def test_the_stack_uses_encoding_and_graph():
    config: ModelConfig = PRESETS["small"].model
    torch.manual_seed(0)
    stack = GraphStack(config).eval()
    nodes, vectors, adjacency = torch.randn(2, 3, 19, 16), torch.randn(2, 3, 19, 16), random_graphs(2, 3)

    output = stack(nodes, vectors, adjacency)

    assert output.shape == (2, 3, 19, 16)
    assert not torch.allclose(output, stack(nodes, -vectors, adjacency))
    assert not torch.allclose(output, stack(nodes, vectors, adjacency.roll(1, dims=(2))))
