"""The same numbers as model.py's formulas, to float rounding, in less time and memory.

Nothing here needs to be known to understand the model. `clip_min.fast.enabled = False`, or
CLIP_MIN_FAST=0 in the environment, turns all of it off: then PyTorch's own path runs.

QuickGELU makes one pass over memory in each direction. Linear layers use AVX-512 on AMD's
processors as well. PyTorch has two libraries for float32 arithmetic on a CPU: it gives matrix
products to MKL, which leaves AVX-512 unused there, and convolutions to oneDNN, which uses it. A
linear layer can be written as a convolution: the rows of x are the pixels of an image one pixel
wide with D channels, and the kernel is 1 x 1,

    y[t, o] = Σ_d x[t, d] · w[o, d] + b[o]        x (T, D), w (O, D), b (O,), y (T, O)

The processor's model decides which library computes, never a measurement, so that runs repeat to
the bit:

- AMD's Zen 5 (family 26): oneDNN is about twice as fast. It computes products of 10⁷ multiply-adds
  or more.
- AMD's Zen 4 (family 25; AVX-512 in two halves of 256 bits): the forward pass is 1.14-1.3x as
  fast, a gradient step 1.0-1.25x, but small products are up to 14 % slower. oneDNN computes
  products of 10⁹ or more, which occur in an image tower's batches.
- All others: MKL always. On Intel's processors MKL uses AVX-512 itself.

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
GAINS_FROM = {ZEN_5: 10**7, ZEN_4: 10**9}  # multiply-adds; 10⁷ take 0.1 ms, more than the detour


class QuickGELU(torch.autograd.Function):
    """x·σ(1.702x), computed as silu(1.702x) / 1.702. Overwrites x if no gradient is needed.

    The result is equal, with two passes over memory fewer in each direction. The two constants
    cancel in the derivative, silu'(1.702x), which autograd would not notice. These tensors are the
    widest in the model: working in place takes half as long as writing to new memory, and saves a
    tenth of the image tower's time.
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
    # With one thread, PyTorch gives 1 x 1 kernels to MKL as well.
    if torch.get_num_threads() == 1 or not convolves(x, weight):
        return F.linear(x, weight, bias)
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    convolution = _convolution if learns else _FrozenConvolution.apply
    y = convolution(_image(x), weight, bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)  # (1, O, T, 1) -> (..., O)


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product: on processors where it is faster, if large enough."""
    rows = x.numel() // x.shape[-1]  # T
    return (
        enabled
        and rows >= 128
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and rows * weight.numel() >= GAINS_FROM.get(processor()[:2], inf)
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def processor() -> tuple[str, int, int]:
    """Vendor, family and model of an x86 processor, from Linux; ("", 0, 0) elsewhere."""
    file = Path("/proc/cpuinfo")
    told = file.read_text() if file.exists() else ""
    found = re.search(r"vendor_id\s*: (.+)\ncpu family\s*: (\d+)\nmodel\s*: (\d+)\n", told)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def _image(x: Tensor) -> Tensor:
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (..., D) -> (1, D, T, 1)


def _convolution(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(image, weight[:, :, None, None], bias)  # (1, D, T, 1) -> (1, O, T, 1)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight is frozen. It stores no input for the backward pass, as F.linear
    does not either: the input's gradient, grad · w, does not depend on the input.
    """

    @staticmethod
    def forward(ctx, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _convolution(image, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kernel = ctx.saved_tensors[0][:, :, None, None]  # (O, D, 1, 1)
        unread = _image(grad.new_empty(grad.shape[2], kernel.shape[1]))  # only its shape is read
        plain = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # F.conv2d's own stride, padding, …
        gradients = torch.ops.aten.convolution_backward(
            grad, unread, kernel, None, *plain, [True, False, False]
        )  # of the image, the weight and the bias
        return gradients[0], None, None
