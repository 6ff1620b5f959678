"""A linear layer computes the same sums, whichever library computes them."""

import pytest
import torch
import torch.nn.functional as F
from oracle import far
from torch import nn

from clip_min.linear import Linear, convolves, linear


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def avx512(monkeypatch, two_threads):
    """A processor with AVX-512, or one that says so: the sums do not depend on it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def large(*shape: int, out: int = 768):
    """x, weight, bias of a product that is worth it."""
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(out, shape[-1], requires_grad=True)
    return x, weight, torch.randn(out, requires_grad=True)


@pytest.mark.parametrize("shape", [(197, 256), (4, 50, 256), (2, 3, 40, 256)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_float64(shape, biased, avx512):
    x, weight, bias = large(*shape)
    bias = bias if biased else None
    assert convolves(x, weight)
    y = linear(x, weight, bias)
    learned = [t for t in (x, weight, bias) if t is not None]
    upstream = torch.randn(*shape[:-1], 768)
    gradients = torch.autograd.grad(y, learned, upstream)

    doubles = [t.detach().double().requires_grad_() for t in learned]
    exact = doubles[0] @ doubles[1].T + (doubles[2] if biased else 0)
    assert y.shape == exact.shape
    assert far(y, exact) < 1e-6
    for ours, theirs in zip(
        gradients, torch.autograd.grad(exact, doubles, upstream.double()), strict=True
    ):
        assert far(ours, theirs) < 1e-5


def test_rows_may_lie_apart_in_memory(avx512):
    """As the heads of attention do: (B, H, T, D/H) -> (B, T, D)."""
    heads = torch.randn(2, 4, 100, 64)
    _, weight, bias = large(1, 256)
    x = heads.transpose(1, 2).flatten(2)
    assert far(linear(x, weight, bias), F.linear(x, weight, bias)) < 1e-6
    every_second = torch.randn(400, 256)[::2]
    assert far(linear(every_second, weight), F.linear(every_second, weight)) < 1e-6


def test_the_same_numbers_every_time(avx512):
    x, weight, bias = large(300, 256)
    runs = []
    for _ in range(3):
        y = linear(x, weight, bias)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_frozen_weight_gets_no_gradient(avx512):
    x, weight, bias = large(197, 256)
    frozen = weight.detach()
    linear(x, frozen).sum().backward()
    assert frozen.grad is None
    assert far(x.grad, frozen.sum(0).expand_as(x)) < 1e-5


def test_what_is_small_or_not_for_onednn_stays_a_plain_product(avx512, monkeypatch):
    x, weight, bias = large(197, 256)
    assert convolves(x, weight)
    assert not convolves(x[:127], torch.randn(9000, 256))  # few rows
    assert not convolves(x, weight[:100])  # few products
    assert not convolves(x.double(), weight.double())
    assert not convolves(x.bfloat16(), weight.bfloat16())
    assert not convolves(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolves(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16
    torch.set_num_threads(1)
    assert not convolves(x, weight)
    torch.set_num_threads(2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not convolves(x, weight)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor lacks AVX-512"
)
def test_large_products_do_run_in_onednn(two_threads):
    layer = Linear(256, 768)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(197, 256)).sum().backward()
    ran = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in ran
    assert not ran & {"aten::addmm", "aten::mm"}


def test_it_is_an_nn_linear_to_everyone_else():
    torch.manual_seed(0)
    ours = Linear(5, 3)
    torch.manual_seed(0)
    theirs = nn.Linear(5, 3)
    assert isinstance(ours, nn.Linear)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[n], t) for n, t in theirs.state_dict().items())
