"""What is computed faster is equal; the parity tests of the model run both ways (`both_ways`)."""

import runpy
from math import inf

import pytest
import torch
import torch.nn.functional as F
from oracle import far
from torch import nn

from clip_min import fast
from clip_min.fast import Linear, convolves, linear
from clip_min.model import Block


def large(*shape: int, out: int = 768):
    """x, weight, bias of a product that is worth it."""
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(out, shape[-1], requires_grad=True)
    return x, weight, torch.randn(out, requires_grad=True)


@pytest.mark.parametrize("shape", [(197, 256), (4, 50, 256), (2, 3, 40, 256)])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_float64(shape, biased, zen5):
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


def test_rows_may_lie_apart_in_memory(zen5):
    """As the heads of attention do: (B, H, T, D/H) -> (B, T, D)."""
    heads = torch.randn(2, 4, 100, 64)
    _, weight, bias = large(1, 256)
    x = heads.transpose(1, 2).flatten(2)
    assert far(linear(x, weight, bias), F.linear(x, weight, bias)) < 1e-6
    every_second = torch.randn(400, 256)[::2]
    assert far(linear(every_second, weight), F.linear(every_second, weight)) < 1e-6


def test_the_same_numbers_every_time(zen5):
    x, weight, bias = large(300, 256)
    runs = []
    for _ in range(3):
        y = linear(x, weight, bias)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def kept(compute) -> int:
    """Bytes that `compute` keeps for its backward pass, but for those of parameters."""
    sizes = []

    def pack(tensor):
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(sizes)


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
@pytest.mark.parametrize("shape", [(197, 256), (2, 150, 256)])
@pytest.mark.parametrize("biased", [True, False])
def test_under_a_frozen_weight_nothing_is_kept_and_the_gradient_is_equal(
    library, shape, biased, request
):
    if library == "oneDNN":
        request.getfixturevalue("zen5")
    layer = Linear(256, 768, bias=biased).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    assert convolves(x, layer.weight) == (library == "oneDNN")
    assert kept(lambda: layer(x)) == 0
    learning = Linear(256, 768)
    assert kept(lambda: learning(x)) == x.nbytes  # the count itself
    upstream = torch.randn(*shape[:-1], 768)
    (ours,) = torch.autograd.grad(layer(x), x, upstream)
    (theirs,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), x, upstream)
    assert far(ours, theirs) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = torch.autograd.grad(layer(x), x, upstream.bfloat16())
        (ours,) = torch.autograd.grad(layer(x).float(), x, upstream)  # within autocast as well
    assert far(rounded, theirs) < 0.02
    assert far(ours, theirs) < 0.02
    assert layer.weight.grad is None


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
def test_a_frozen_block_keeps_ten_widths_a_token(library, request):
    """The inputs of its layer norms, q, k, v and what attention gathers, and QuickGELU's input."""
    if library == "oneDNN":
        request.getfixturevalue("zen5")
    block, x = Block(256, 4).requires_grad_(False), torch.randn(1, 150, 256, requires_grad=True)
    assert 10 * x.nbytes <= kept(lambda: block(x)) < 10.1 * x.nbytes


def test_a_bias_that_learns_alone_gets_its_gradient(zen5):
    x, weight, bias = large(197, 256)
    linear(x, weight.detach(), bias).sum().backward()
    assert far(bias.grad, torch.full((768,), 197.0)) < 1e-6


def test_what_is_small_or_not_for_onednn_stays_a_plain_product(zen5, monkeypatch):
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
    with monkeypatch.context() as one:
        one.setattr(fast, "_FrozenConvolution", None)  # nor is it asked for
        assert torch.equal(linear(x, weight.detach()), F.linear(x, weight))
    torch.set_num_threads(2)
    with monkeypatch.context() as off:
        off.setattr(fast, "enabled", False)
        assert not convolves(x, weight)
    assert convolves(x, weight)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not convolves(x, weight)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("processor", "from_products"),
    [
        (("AuthenticAMD", 26, 17), 1e7),  # Zen 5
        (("AuthenticAMD", 25, 97), 1e9),  # Zen 4
        (("AuthenticAMD", 23, 49), inf),
        (("GenuineIntel", 6, 207), inf),
        (("", 0, 0), inf),  # not Linux, or not x86
    ],
)
def test_the_processor_decides_which_products_go_to_onednn(
    processor, from_products, zen5, monkeypatch
):
    monkeypatch.setattr(fast, "processor", lambda: processor)
    x = torch.empty(1000, 1000)
    for products in (9.9e6, 1.01e7, 9.9e8, 1.01e9, 1e10):
        weight = torch.empty(int(products) // 1_000_000, 1000)
        assert convolves(x, weight) == (products >= from_products)


CPUINFO = """processor\t: {0}
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 68
model name\t: AMD Ryzen 9 9950X 16-Core Processor
stepping\t: 0
"""


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (CPUINFO.format(0) + "\n" + CPUINFO.format(1), ("AuthenticAMD", 26, 68)),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\n", ("", 0, 0)),
        (None, ("", 0, 0)),
    ],
)
def test_the_processor_is_read_from_what_linux_tells(told, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if told is not None:
        path.write_text(told)
    monkeypatch.setattr(fast, "Path", lambda _: path)
    assert fast.processor.__wrapped__() == expected


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, True)])
def test_the_environment_turns_it_off(value, expected, monkeypatch):
    monkeypatch.delenv("CLIP_MIN_FAST", raising=False)
    if value is not None:
        monkeypatch.setenv("CLIP_MIN_FAST", value)
    assert runpy.run_path(fast.__file__)["enabled"] == expected


def test_turned_off_pytorchs_own_path_runs(zen5, monkeypatch):
    monkeypatch.setattr(fast, "enabled", False)
    block, x = Block(256, 4), torch.randn(2, 150, 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block(x)
    ran = {event.key for event in profile.key_averages()}
    assert {"aten::addmm", "aten::sigmoid"} < ran
    assert not ran & {"aten::mkldnn_convolution", "aten::silu", "aten::silu_"}


def test_large_products_do_run_in_onednn(zen5):
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
