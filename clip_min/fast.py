"""The same numbers as model.py's formulas, to float rounding, in less time and memory.

Nothing here needs to be known to understand the model. `clip_min.fast.enabled = False`, or
CLIP_MIN_FAST=0 in the environment, turns all of it off: then PyTorch's own path runs.

QuickGELU runs in one pass over memory each way. And linear layers use the whole processor: PyTorch
has two libraries for float32 arithmetic on a CPU. Matrix products go to MKL, which on AMD's
processors leaves AVX-512 unused; convolutions go to oneDNN, which uses it. But a linear layer is a
convolution, too: the rows of x are the pixels of an image one pixel wide, with D channels, and the
kernel is 1 x 1,

    y[t, o] = Σ_d x[t, d] · w[o, d] + b[o]        x (T, D), w (O, D), b (O,), y (T, O)

What the processor is decides, never a measurement, so that runs repeat to the bit:

- AMD's Zen 5 (family 26), where oneDNN is about twice as fast: products from 10⁷ multiply-adds.
- AMD's Zen 4 (family 25 with AVX-512, in two halves of 256 bits): forward 1.14-1.3x as fast, a step
  1.0-1.25x, but small products up to 14 % slower: from 10⁹, as an image tower meets in a batch.
- All others: never. On Intel's, MKL uses AVX-512 itself.

`python bench/linear.py` times both libraries on the machine at hand.
"""

import functools
import os
import re
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

enabled = os.environ.get("CLIP_MIN_FAST") != "0"

ZEN_4, ZEN_5 = ("AuthenticAMD", 25), ("AuthenticAMD", 26)
GAINS_FROM = {ZEN_5: 10**7, ZEN_4: 10**9}  # multiply-adds; 10⁷ are 0.1 ms, some times the detour


class QuickGELU(torch.autograd.Function):
    """x·σ(1.702x) as silu(1.702x) / 1.702. Where no gradient is asked for, x is overwritten.

    Equal, and two passes over memory fewer each way: in the derivative, silu'(1.702x), the two
    constants cancel, which autograd does not see. These tensors are the widest of all: in place
    takes half as long as writing to new memory, a tenth of the image tower's time.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            ctx.mark_dirty(x)
            return F.silu(x.mul_(1.702), inplace=True).div_(1.702)
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., D), weight (O, D), bias (O,) -> (..., O)."""
    if not convolves(x, weight):
        return F.linear(x, weight, bias)
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    convolution = _convolution if learns else _FrozenConvolution.apply
    y = convolution(_image(x), weight, bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)  # (1, O, T, 1) -> (..., O)


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether the product goes to oneDNN: where that gains, and it is large enough to."""
    rows = x.numel() // x.shape[-1]  # T
    return (
        enabled
        and rows >= 128
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.get_num_threads() > 1  # with one, PyTorch gives 1 x 1 kernels to MKL as well
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and rows * weight.numel() >= GAINS_FROM.get(processor()[:2], inf)
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def processor() -> tuple[str, int, int]:
    """Vendor, family and model of an x86 processor, as Linux tells them; ("", 0, 0) elsewhere."""
    file = Path("/proc/cpuinfo")
    told = file.read_text() if file.exists() else ""
    found = re.search(r"vendor_id\s*: (.+)\ncpu family\s*: (\d+)\nmodel\s*: (\d+)\n", told)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def _image(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (..., D) -> (1, D, T, 1)


def _convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(image, weight[:, :, None, None], bias)  # (1, D, T, 1) -> (1, O, T, 1)


class _FrozenConvolution(torch.autograd.Function):
    """Where only the input learns, as F.linear does and F.conv2d does not, keep no input for the
    backward pass: its gradient, grad · w, does not depend on it.
    """

    @staticmethod
    def forward(ctx, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _convolution(image, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kernel = ctx.saved_tensors[0][:, :, None, None]  # (O, D, 1, 1)
        unread = _image(grad.new_empty(grad.shape[2], kernel.shape[1]))  # for its shape alone
        plain = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # F.conv2d's own stride, padding, …
        gradients = torch.ops.aten.convolution_backward(
            grad, unread, kernel, None, *plain, [True, False, False]
        )  # of the image, the weight and the bias
        return gradients[0], None, None
