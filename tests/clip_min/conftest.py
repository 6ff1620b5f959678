import pytest
import torch
from oracle import SMALL, openai_clip, renamed
from torch import Tensor


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
