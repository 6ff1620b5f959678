"""A linear layer that uses the whole processor.

PyTorch has two libraries for float32 arithmetic on a CPU. Matrix products go to MKL, which on AMD's
processors leaves AVX-512, half of their speed, unused; convolutions go to oneDNN, which uses it.
But a linear layer is a convolution, too: the rows of x are the pixels of an image one pixel wide,
with D channels, and the kernel is 1 x 1,

    y[t, o] = Σ_d x[t, d] · w[o, d] + b[o]        x (T, D), w (O, D), b (O,), y (T, O)

The sums are the same, forward and backward, up to float rounding. `python bench/linear.py` times
both libraries on the machine at hand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear, whose large float32 products on a CPU with AVX-512 run in oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., D), weight (O, D), bias (O,) -> (..., O)."""
    if not convolves(x, weight):
        return F.linear(x, weight, bias)
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, T, 1, D) -> (1, D, T, 1)
    y = F.conv2d(image, weight[:, :, None, None], bias)  # (1, O, T, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)  # (1, T, 1, O) -> (..., O)


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether the product goes to oneDNN: where that can gain, and it is not too small to."""
    rows = x.numel() // x.shape[-1]  # T
    return (
        rows >= 128
        and rows * weight.numel() >= 10_000_000  # multiply-adds: 0.1 ms, a few times the detour
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.get_num_threads() > 1  # with one, PyTorch gives 1 x 1 kernels to MKL as well
        and not torch.is_autocast_enabled("cpu")
    )
