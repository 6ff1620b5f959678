import pytest
import torch
from oracle import SMALL, openai_clip, renamed
from torch import Tensor

from clip_min import fast


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def theirs():
    """The one CLIP that files hold."""
    return openai_clip(SMALL)


@pytest.fixture
def state(theirs) -> dict[str, Tensor]:
    """Its tensors under our names; every test may spoil its own."""
    return {name: tensor.clone() for name, tensor in renamed(theirs.state_dict()).items()}


@pytest.fixture(params=["fast", "plain"])
def both_ways(request, monkeypatch):
    """With what fast.py computes faster, and by PyTorch's own path."""
    monkeypatch.setattr(fast, "enabled", request.param == "fast")


@pytest.fixture
def zen5(monkeypatch):
    """Two threads of a processor that says it is a Zen 5: the sums do not depend on it."""
    monkeypatch.setattr(fast, "processor", lambda: ("AuthenticAMD", 26, 68))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
