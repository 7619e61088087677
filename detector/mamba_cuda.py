"""The fused CUDA kernel of Mamba-2, where the optional package ``mamba_ssm`` is installed."""

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from detector.mamba import Mamba2

KERNEL_CHUNK = 256
"""Steps per chunk of the fused kernel; its package's default."""


@cache
def has_fused_kernel() -> bool:
    """Whether ``mamba_ssm`` and the convolution it needs are installed; neither is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


def fused_mixer(mixer: "Mamba2", projected: Tensor) -> Tensor:
    """What ``Mamba2.forward`` makes of its projected input, in one kernel and with the same weights.

    Args:
        mixer: The layer whose weights are used.
        projected: Output of its ``in_proj``, (sequences, time, d_in_proj), on a CUDA device.

    Returns:
        (sequences, time, d_model).

    Raises:
        ValueError: If d_in_proj is not a multiple of 8: the convolution kernel reads its rows in aligned groups of 8
            and would stop with a stride error (state-spaces/mamba issues 351 and 643).
    """
    check_alignment(mixer)
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    kernel: Any = mamba_split_conv1d_scan_combined
    return kernel(
        projected,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -mixer.A_log.float().exp(),
        mixer.D,
        chunk_size=KERNEL_CHUNK,
        activation="silu",
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=mixer.norm.eps,
        outproj_weight=mixer.out_proj.weight,
        outproj_bias=None,
        headdim=mixer.headdim,
        ngroups=1,
        norm_before_gate=False,
    )


def check_alignment(mixer: "Mamba2") -> None:
    """Refuses a layer that the fused kernel cannot run.

    Raises:
        ValueError: If d_in_proj is not a multiple of 8.
    """
    width = mixer.in_proj.out_features
    if width % 8:
        raise ValueError(
            f"the fused kernel needs an input projection whose width is a multiple of 8, got {width} "
            f"= 2 * {mixer.d_inner} + 2 * {mixer.d_state} + {mixer.nheads}; choose a headdim that makes it one"
        )
