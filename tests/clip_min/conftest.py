import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same random numbers whatever ran before it."""
    torch.manual_seed(0)
