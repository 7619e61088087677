"""Mamba-2 in plain torch: the state-space scan, its mixer, and the bidirectional stack of both streams.

Shapes: S sequences, T time steps, D model width, H heads of P channels each, N states per channel; K chunks of Q steps.
Names of parameters and their initial values are those of ``mamba_ssm.modules.mamba2.Mamba2``, so weights are
interchangeable.

Source:
    Dao and Gu 2024, arXiv:2405.21060 (the recurrence and its chunked form); Gu and Dao 2023, arXiv:2312.00752 (how dt
    starts).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detector.mamba_cuda import fused_mixer, has_fused_kernel

CHUNK = 8
"""Steps per chunk: the longest whose scaled decays leave float32 room for the values; see ``ssd_scan``."""

MAX_TEMPORARY_BYTES = 12_000_000
"""Largest intermediate tensor on the CPU. Anything over 32 MiB goes back to the kernel after every use and is faulted
in again; a few of this size still share the last-level cache."""


def ssd_scan(x_STHP: Tensor, dt_STH: Tensor, a_H: Tensor, b_STN: Tensor, c_STN: Tensor, d_H: Tensor) -> Tensor:
    """State-space scan of whole sequences, computed in chunks by matrix products.

    With ``h_0 = 0``: ``h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T`` and ``y_t = h_t c_t + d x_t``, per head.

    Args:
        x_STHP: Input, (sequences, time, heads, channels); any T.
        dt_STH: Step sizes, (sequences, time, heads), >= 0.
        a_H: Decay rates, (heads,), < 0.
        b_STN: Input directions, (sequences, time, states), shared by the heads.
        c_STN: Read-out directions, (sequences, time, states), shared by the heads.
        d_H: Weight of the direct path, (heads,).

    Returns:
        (sequences, time, heads, channels); float64 for float64 input, else float32, also under autocast.

    Numerics:
        A decay between two steps of a chunk is a quotient of two factors measured from the middle of the chunk's range:
        ``exp(c_i - c_j) = exp(c_i - m) exp(m - c_j)``, which needs no (Q, Q) matrix per head. The factors are large and
        small where their product is not, so each step's ``dt a`` is clamped at ``log(eps / 2)``: -16.6 in float32, a
        decay that is lost in rounding next to the step's own input. Then the factors stay below
        ``exp((Q - 1) / 2 * 16.6)``, 2e25 at Q = 8, and the values may reach 1e13 before anything overflows; Q = 12
        would already overflow by itself. The clamp sits before ``exp``: applied after it, inf * 0 would be NaN.
        Products with later steps, which may overflow, are cut away by ``tril``, which selects and does not multiply.
        Error in float32 below 1e-5 of the largest output for ``dt a`` down to -250 (tests/detector/test_mamba.py).
    """
    dtype = torch.promote_types(x_STHP.dtype, torch.float32)
    x, dt, a, b, c, d = (tensor.to(dtype) for tensor in (x_STHP, dt_STH, a_H, b_STN, c_STN, d_H))
    length = x.shape[1]
    if padding := -length % CHUNK:
        # dt = 0 neither decays nor adds, so padded steps are inert.
        x, dt, b, c = F.pad(x, (0, 0, 0, 0, 0, padding)), *(F.pad(t, (0, 0, 0, padding)) for t in (dt, b, c))
    with torch.autocast(x.device.type, enabled=False):
        y = _scan_chunks(x, dt, a, b, c)
        # One product over the joined (H, P) axis: a broadcast over P alone is several times slower.
        y = torch.addcmul(y, x.flatten(2), d.repeat_interleave(x.shape[-1]))
    return y[:, :length].unflatten(-1, x.shape[2:])


def _scan_chunks(x_STHP: Tensor, dt_STH: Tensor, a_H: Tensor, b_STN: Tensor, c_STN: Tensor) -> Tensor:
    """The scan without its direct path, (S, T, H * P); T is a multiple of CHUNK. Why it clamps: see ``ssd_scan``."""
    num_sequences, length, num_heads, head_dim = x_STHP.shape
    num_chunks, num_states = length // CHUNK, b_STN.shape[-1]
    floor = math.log(torch.finfo(x_STHP.dtype).eps / 2)
    dt = dt_STH.unflatten(1, (num_chunks, CHUNK))
    log_decay = (dt * a_H).clamp(min=floor).cumsum(2)
    first, last = log_decay[:, :, 0], log_decay[:, :, -1]
    middle = (first + last) / 2

    scale = dt * (middle.unsqueeze(2) - log_decay).exp()
    scaled = x_STHP.unflatten(1, (num_chunks, CHUNK)) * scale.unsqueeze(-1)
    scaled = scaled.reshape(num_sequences * num_chunks, CHUNK, num_heads * head_dim)
    b = b_STN.reshape(num_sequences * num_chunks, CHUNK, num_states)
    c = c_STN.reshape(num_sequences * num_chunks, CHUNK, num_states)

    # Back to unscaled before the carry: its gradients multiply states by the gradients of states, and the product of
    # two scaled ones would overflow.
    to_end = (last - middle).exp().repeat_interleave(head_dim, dim=-1).unsqueeze(2)
    to_middle = middle.exp().repeat_interleave(head_dim, dim=-1).unsqueeze(2)
    added = torch.bmm(b.mT, scaled).view(num_sequences, num_chunks, num_states, num_heads * head_dim) * to_end
    carried = (_Carry.apply(added, last.exp().repeat_interleave(head_dim, dim=-1)) * to_middle).flatten(0, 1)
    y = torch.baddbmm(torch.bmm(c, carried), torch.bmm(c, b.mT).tril(), scaled)
    y = y.view(num_sequences, num_chunks, CHUNK, num_heads, head_dim)
    y = y * (log_decay - middle.unsqueeze(2)).exp().unsqueeze(-1)
    return y.reshape(num_sequences, length, num_heads * head_dim)


class _Carry(torch.autograd.Function):
    """State before each chunk: ``h_0 = 0``, ``h_{k+1} = decay_k h_k + added_k``.

    Takes added (S, K, N, C) and decay (S, K, C), gives states (S, K, N, C). The backward pass is written by hand: the
    same recurrence in reverse, into one tensor, where autograd would keep and join one gradient per chunk.
    """

    @staticmethod
    def forward(ctx: Any, added_SKNC: Tensor, decay_SKC: Tensor) -> Tensor:
        states = torch.empty_like(added_SKNC)
        decay = decay_SKC.unsqueeze(2)
        states[:, 0] = 0
        for k in range(1, states.shape[1]):
            torch.addcmul(added_SKNC[:, k - 1], states[:, k - 1], decay[:, k - 1], out=states[:, k])
        ctx.save_for_backward(states, decay)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SKNC: Tensor) -> tuple[Tensor, Tensor]:
        states, decay = ctx.saved_tensors
        # What is added in chunk k is first seen in the state before chunk k + 1; after the last nobody sees it.
        d_added = torch.empty_like(states)
        d_added[:, -1] = 0
        for k in range(states.shape[1] - 1, 0, -1):
            torch.addcmul(grad_SKNC[:, k], d_added[:, k], decay[:, k], out=d_added[:, k - 1])
        return d_added, (d_added * states).sum(2)


def ssd_scan_sequential(
    x_STHP: Tensor, dt_STH: Tensor, a_H: Tensor, b_STN: Tensor, c_STN: Tensor, d_H: Tensor
) -> Tensor:
    """The same as ``ssd_scan``, one time step after the other: the oracle, slow, in the dtype of its input.

    Args:
        x_STHP: Input, (sequences, time, heads, channels).
        dt_STH: Step sizes, (sequences, time, heads), >= 0.
        a_H: Decay rates, (heads,), < 0.
        b_STN: Input directions, (sequences, time, states).
        c_STN: Read-out directions, (sequences, time, states).
        d_H: Weight of the direct path, (heads,).

    Returns:
        (sequences, time, heads, channels).
    """
    state_SHPN = x_STHP.new_zeros(*x_STHP.shape[::2][:2], x_STHP.shape[3], b_STN.shape[-1])
    outputs = []
    for x, dt, b, c in zip(*(tensor.unbind(1) for tensor in (x_STHP, dt_STH, b_STN, c_STN)), strict=True):
        decay = (dt * a_H).exp()[..., None, None]
        state_SHPN = decay * state_SHPN + (dt.unsqueeze(-1) * x).unsqueeze(-1) * b[:, None, None, :]
        outputs.append((state_SHPN * c[:, None, None, :]).sum(-1) + d_H[:, None] * x)
    return torch.stack(outputs, dim=1)


class GatedRMSNorm(nn.Module):
    """Weight of the norm between scan and output projection; ``Mamba2`` folds it into that projection."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def inverse_rms(self, gated: Tensor) -> Tensor:
        """``1 / sqrt(mean square + eps)`` over the last axis; eps bounds the gradient gain of a zero row at 316."""
        mean_square = torch.linalg.vecdot(gated, gated) / gated.shape[-1]
        return torch.rsqrt(mean_square + self.eps).unsqueeze(-1)


class Mamba2(nn.Module):
    """Causal Mamba-2 mixer with one group of B and C.

    Attributes:
        in_proj: D -> z, x, B, C, dt; Linear's own initial values, no bias.
        conv1d: Depthwise causal convolution over x, B and C; Conv1d's own initial values.
        dt_bias: Inverse softplus of steps log-uniform in [1e-3, 0.1].
        A_log: Logarithm of rates uniform in [1, 16].
        D: Weight of the direct path, 1.
        norm: Gated norm before the output, weight 1.
        out_proj: H * P -> D; Linear's own initial values, no bias.

    ``A_log``, ``D`` and ``dt_bias`` carry ``_no_weight_decay``: pulling them to zero changes time constants.

    Args:
        d_model: Width in and out.
        d_state: States per channel.
        headdim: Channels per head.
        expand: Inner width over ``d_model``.
        d_conv: Taps of the convolution.

    Raises:
        ValueError: If ``headdim`` does not divide ``expand * d_model``.
    """

    def __init__(self, d_model: int, d_state: int, headdim: int, *, expand: int = 2, d_conv: int = 4) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.headdim = expand * d_model, d_state, headdim
        if self.d_inner % headdim:
            raise ValueError(f"headdim {headdim} does not divide the inner width {self.d_inner}")
        self.nheads = self.d_inner // headdim
        conv_width = self.d_inner + 2 * d_state
        self.widest = max(conv_width, self.d_inner + self.nheads, 2 * d_model)
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_width + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(conv_width, conv_width, d_conv, groups=conv_width)
        dt = torch.exp(torch.empty(self.nheads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, u_STD: Tensor) -> Tensor:
        """The mixed sequence, (S, T, D); output t depends on inputs up to t only."""
        if u_STD.is_cuda and has_fused_kernel():
            return fused_mixer(self, self.in_proj(u_STD))
        gate, dt, mixed = self._project(u_STD)
        x, b, c = F.silu(mixed).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        # A strided x nearly triples the time of a broadcast product.
        x = x.contiguous()
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)
        rates = -self.A_log.to(wide).exp()
        y = ssd_scan(x.unflatten(-1, (self.nheads, self.headdim)), dt, rates, b, c, self.D)
        gated = y.flatten(2) * F.silu(gate)
        # The norm's weight goes into the projection and its divisor behind it, where the rows are half as wide.
        return F.linear(gated, self.out_proj.weight * self.norm.weight) * self.norm.inverse_rms(gated)

    def _project(self, u_STD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate (S, T, d_inner), raw step (S, T, H) and convolved x, B, C (S, T, d_inner + 2 N).

        ``conv1d`` follows ``in_proj`` with nothing in between, so the two are one dense convolution, whose weight is
        their product. At the edge stream's widths it takes half the time of a narrow matrix product and a depthwise
        convolution, at the node stream's the same.
        """
        to_gate, to_conv, to_dt = self.in_proj.weight.split([self.d_inner, len(self.conv1d.weight), self.nheads])
        gate, dt = _conv_over_time(u_STD, torch.cat([to_gate, to_dt]).unsqueeze(-1)).split(
            [self.d_inner, self.nheads], dim=-1
        )
        kernel = self.conv1d.weight * to_conv.unsqueeze(-1)
        past = F.pad(u_STD, (0, 0, kernel.shape[-1] - 1, 0))
        return gate, dt, _conv_over_time(past, kernel, self.conv1d.bias)


def _conv_over_time(x_STC: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution along time, without padding; channels stay innermost.

    Two-dimensional with height 1, because conv1d would transpose to channels first and back.
    """
    return F.conv2d(x_STC.mT.unsqueeze(2), weight.unsqueeze(2), bias).squeeze(2).mT


class BiMamba2(nn.Module):
    """One bidirectional layer: a forward and a time-reversed mixer with their own weights, joined and added.

    ``y = x + join([forward(LN(x)) | flip(backward(flip(LN(x))))])``. The norm comes first, unlike the original layer's:
    the residual path then carries x unscaled, so its gradient does not pass a norm per layer, a stream's input keeps
    its magnitude, and the mixers see inputs of norm sqrt(D) whatever enters the model.
    """

    def __init__(self, d_model: int, d_state: int, headdim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.forward_mixer = Mamba2(d_model, d_state, headdim)
        self.backward_mixer = Mamba2(d_model, d_state, headdim)
        self.join = nn.Linear(2 * d_model, d_model)
        nn.init.zeros_(self.join.bias)

    def forward(self, x_STD: Tensor) -> Tensor:
        """(S, T, D) to (S, T, D)."""
        normed = self.norm(x_STD)
        past = self.forward_mixer(normed)
        future = self.backward_mixer(normed.flip(1)).flip(1)
        return x_STD + self.join(torch.cat([past, future], dim=-1))


class BiMambaStack(nn.Module):
    """``num_layers`` bidirectional layers over sequences that do not see each other.

    On the CPU the sequences go through in blocks, so that no intermediate tensor exceeds MAX_TEMPORARY_BYTES. A block
    is as large as one direction of one layer allows; batching the two directions would only halve the blocks.
    """

    def __init__(self, d_model: int, num_layers: int, d_state: int, headdim: int) -> None:
        super().__init__()
        layers = [BiMamba2(d_model, d_state, headdim) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        self.widest = max((layer.forward_mixer.widest for layer in layers), default=d_model)

    def forward(self, x_STD: Tensor) -> Tensor:
        """(S, T, D) to (S, T, D); sequences are independent."""
        blocks = [self._layers(block) for block in x_STD.split(self._block_size(x_STD))]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _layers(self, x_STD: Tensor) -> Tensor:
        """All layers over one block."""
        for layer in self.layers:
            x_STD = layer(x_STD)
        return x_STD

    def _block_size(self, x_STD: Tensor) -> int:
        """Sequences per block, evenly spread."""
        if x_STD.is_cuda or not len(x_STD):
            return len(x_STD)
        limit = max(1, MAX_TEMPORARY_BYTES // (x_STD.shape[1] * self.widest * x_STD.element_size()))
        return math.ceil(len(x_STD) / math.ceil(len(x_STD) / limit))
