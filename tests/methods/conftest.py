"""A CLIP small enough for a test, and pictures for it."""

from types import SimpleNamespace

import pytest
import torch

from clip_min import CLIP, CLIPConfig


@pytest.fixture
def new_clip():
    """() -> a tiny CLIP; every call returns the same weights in tensors of their own."""

    def new() -> CLIP:
        torch.manual_seed(0)
        clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)).eval()
        with torch.no_grad():  # no bias is 0, so that all of them count
            for parameter in clip.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        return clip

    return new


@pytest.fixture
def images() -> torch.Tensor:
    """(B, 3, 32, 32), normalised."""
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pictures():
    """(features (N, E), labels (N,)) -> what `fit` and `remember` read of labelled pictures."""

    def make(features: torch.Tensor, labels) -> SimpleNamespace:
        labels = torch.as_tensor(labels)
        return SimpleNamespace(encoded=lambda method: features, labels=labels)

    return make
