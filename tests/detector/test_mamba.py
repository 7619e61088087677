"""The chunked scan against a float64 loop, and the mixer around it."""

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from detector import mamba
from detector.mamba import BiMamba2, BiMambaStack, Mamba2, ssd_scan, ssd_scan_sequential
from detector.mamba_cuda import check_alignment

NAMES = ("x", "dt", "a", "b", "c", "d")


def scan_inputs(seed: int, length: int, largest_dt: float, *, heads: int = 3) -> list[torch.Tensor]:
    """Random float64 inputs whose step sizes are log-uniform up to ``largest_dt``; rates are 1 to 16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = largest_dt * torch.exp(-8 * torch.rand(2, length, heads, generator=generator, dtype=torch.float64))
    rates = -(1 + 15 * torch.rand(heads, generator=generator, dtype=torch.float64))
    return [normal(2, length, heads, 4), dt, rates, normal(2, length, 5), normal(2, length, 5), normal(heads)]


def with_gradients(scan, inputs: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and input gradients of a fixed weighted sum."""
    leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in inputs]
    output = scan(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights.to(dtype)).sum().backward()
    return output.detach(), [leaf.grad for leaf in leaves]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 70), largest=st.sampled_from([1e-3, 0.1, 1.0, 4.0, 250 / 16]))
def test_float32_scan_and_gradients_match_the_float64_loop(seed, length, largest):
    inputs = scan_inputs(seed, length, largest)
    rounded = [tensor.float().double() for tensor in inputs]
    expected, expected_gradients = with_gradients(ssd_scan_sequential, rounded, torch.float64)

    actual, gradients = with_gradients(ssd_scan, rounded, torch.float32)

    assert relative_error(actual, expected) < 1e-5
    for name, gradient, reference in zip(NAMES, gradients, expected_gradients, strict=True):
        if name == "a":
            # A sum over all steps that may cancel: measured against its summands, which those of dt resemble.
            summands = (rounded[1] * expected_gradients[1]).abs().sum()
            assert (gradient.double() - reference).abs().max() < 3e-5 * summands
        else:
            assert relative_error(gradient, reference) < 3e-5, name


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 40))
def test_float64_scan_matches_to_float64_precision(seed, length):
    inputs = scan_inputs(seed, length, 1.0)
    expected, expected_gradients = with_gradients(ssd_scan_sequential, inputs, torch.float64)

    actual, gradients = with_gradients(ssd_scan, inputs, torch.float64)

    assert actual.dtype == torch.float64
    assert relative_error(actual, expected) < 1e-13
    for name, gradient, reference in zip(NAMES, gradients, expected_gradients, strict=True):
        assert relative_error(gradient, reference) < (1e-9 if name == "a" else 1e-11), name


@pytest.mark.parametrize("magnitude", [1.0, 1e6])
def test_every_step_at_an_extreme_decay_stays_finite(magnitude):
    x, dt, _, b, c, d = scan_inputs(0, 64, 1.0)
    inputs = [x * magnitude, torch.full_like(dt, 250.0), torch.tensor([-1.0, -16.0, -300.0]).double(), b, c, d]
    expected, _ = with_gradients(ssd_scan_sequential, inputs, torch.float64)

    actual, gradients = with_gradients(ssd_scan, inputs, torch.float32)

    assert relative_error(actual, expected) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_stay_finite_where_an_extreme_chunk_meets_another():
    # Found by the property test above: products of scaled states and their gradients overflowed between chunks.
    inputs = scan_inputs(49, 23, 250 / 16)

    _, gradients = with_gradients(ssd_scan, inputs, torch.float32)

    assert all(gradient.isfinite().all() for gradient in gradients)


def test_without_the_clamp_the_same_inputs_give_nan(monkeypatch):
    inputs = scan_inputs(0, 64, 1.0)
    inputs[1] = torch.full_like(inputs[1], 250.0)
    monkeypatch.setattr(mamba.math, "log", lambda value: -math.inf)

    actual, _ = with_gradients(ssd_scan, inputs, torch.float32)

    assert actual.isnan().any()


def test_chunks_leave_float32_room_for_the_values():
    floor = math.log(torch.finfo(torch.float32).eps / 2)

    assert math.exp(-floor * (mamba.CHUNK - 1) / 2) * 1e12 < torch.finfo(torch.float32).max


def test_scan_is_float32_under_autocast():
    inputs = [tensor.float() for tensor in scan_inputs(0, 24, 0.1)]
    expected = ssd_scan(*inputs)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ssd_scan(*inputs)

    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def mixer_by_definition(mixer: Mamba2, u: torch.Tensor) -> torch.Tensor:
    """The mixer as its modules name it, with the sequential scan and nothing folded."""
    inner, states = mixer.d_inner, mixer.d_state
    gate, conv_in, dt = mixer.in_proj(u).split([inner, inner + 2 * states, mixer.nheads], dim=-1)
    conv_out = mixer.conv1d(F.pad(conv_in.mT, (mixer.conv1d.kernel_size[0] - 1, 0))).mT
    x, b, c = F.silu(conv_out).split([inner, states, states], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias)
    y = ssd_scan_sequential(x.unflatten(-1, (mixer.nheads, -1)), dt, -mixer.A_log.exp(), b, c, mixer.D).flatten(2)
    return mixer.out_proj(F.rms_norm(y * F.silu(gate), (inner,), mixer.norm.weight, mixer.norm.eps))


@pytest.mark.parametrize("length", [1, 7, 8, 61])
def test_mixer_equals_its_definition_with_gradients(length):
    torch.manual_seed(0)
    mixer = Mamba2(16, 8, 4).double()
    torch.nn.init.uniform_(mixer.norm.weight)
    u = torch.randn(3, length, 16, dtype=torch.float64)
    expected = mixer_by_definition(mixer, u)
    parameters = list(mixer.parameters())
    expected_gradients = torch.autograd.grad(expected.sin().sum(), parameters)

    actual = mixer(u)

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(
        torch.autograd.grad(actual.sin().sum(), parameters), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-11)


def test_parameters_are_those_of_mamba_ssm():
    shapes = {name: tuple(parameter.shape) for name, parameter in Mamba2(64, 8, 8).named_parameters()}

    assert shapes == {
        "in_proj.weight": (288, 64),
        "conv1d.weight": (144, 1, 4),
        "conv1d.bias": (144,),
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }


def test_initial_values_and_decay_flags():
    mixer = Mamba2(512, 8, 4)
    steps = F.softplus(mixer.dt_bias)

    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 * 1.001
    assert mixer.A_log.min() >= 0
    assert mixer.A_log.max() <= math.log(16) + 1e-6
    assert torch.equal(mixer.D, torch.ones(256))
    flagged = {name for name, parameter in mixer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert flagged == {"dt_bias", "A_log", "D"}


def test_mixer_is_causal_and_the_layer_is_not():
    torch.manual_seed(0)
    mixer, layer = Mamba2(16, 8, 4), BiMamba2(16, 8, 4)
    u = torch.randn(1, 40, 16)
    changed = u.clone()
    changed[:, 21:] = torch.randn(1, 19, 16)

    causal = (mixer(changed) - mixer(u)).abs().amax((0, 2))
    both_ways = (layer(changed) - layer(u)).abs().amax((0, 2))

    # Not exactly zero inside a chunk: its middle, which cancels, depends on all its steps.
    assert causal[:21].max() < 1e-6 < 1e-3 < causal[21:].min()
    assert both_ways[20] > 1e-4


def test_reversed_input_with_swapped_directions_gives_the_reversed_output():
    torch.manual_seed(0)
    layer, swapped = BiMamba2(8, 4, 2).double(), BiMamba2(8, 4, 2).double()
    swapped.norm, swapped.join.bias = layer.norm, layer.join.bias
    swapped.forward_mixer, swapped.backward_mixer = layer.backward_mixer, layer.forward_mixer
    swapped.join.weight.data = layer.join.weight.data.roll(8, dims=1)
    u = torch.randn(2, 21, 8, dtype=torch.float64)

    torch.testing.assert_close(swapped(u.flip(1)).flip(1), layer(u), rtol=1e-10, atol=1e-12)


def test_blocks_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    stack = BiMambaStack(8, 2, 4, 2)
    sequences = torch.randn(11, 33, 8)
    expected = stack(sequences)
    monkeypatch.setattr(mamba, "MAX_TEMPORARY_BYTES", 4 * 33 * 32 * 4)

    torch.testing.assert_close(stack(sequences), expected, rtol=1e-5, atol=1e-6)
    assert stack._block_size(sequences) < 11


@pytest.mark.parametrize(("shape", "width", "headdim"), [((171, 960, 16), 16, 4), ((76, 960, 64), 64, 8)])
def test_no_tensor_exceeds_the_limit_at_full_size(shape, width, headdim):
    stack = BiMambaStack(width, 1, 8, headdim)
    size = stack._block_size(torch.empty(shape))

    assert size * shape[1] * stack.widest * 4 <= 30_000_000


def test_zero_input_gives_finite_gradients():
    layer = BiMamba2(16, 8, 4)
    u = torch.zeros(2, 30, 16, requires_grad=True)

    layer(u).sum().backward()

    assert u.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_headdim_must_divide_the_inner_width():
    with pytest.raises(ValueError, match="headdim 5 does not divide the inner width 32"):
        Mamba2(16, 8, 5)


def test_the_fused_kernel_refuses_a_projection_that_is_not_a_multiple_of_8():
    check_alignment(Mamba2(16, 8, 4))

    with pytest.raises(ValueError, match="multiple of 8, got 84"):
        check_alignment(Mamba2(16, 8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs the cuda extra (mamba_ssm)")
@pytest.mark.parametrize("length", [160, 960])
def test_the_fused_kernel_gives_what_torch_gives(length):
    torch.manual_seed(0)
    mixer = Mamba2(64, 8, 8)
    u = torch.randn(4, length, 64)
    expected = mixer(u)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), list(mixer.parameters()))

    mixer.cuda()
    actual = mixer(u.cuda())

    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(actual.sin().sum(), list(mixer.parameters()))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), reference, rtol=1e-2, atol=1e-2 * reference.abs().max().item())
