"""The filter decides as the method itself predicts."""

import pytest
import torch
from torchvision.transforms import functional as tv

import clip_min
from fewshot import demo
from gen.filter import Filter, margins
from methods import METHODS

NAMES = demo.CLASSNAMES[:51]


@pytest.fixture(scope="module")
def seen():
    """Twelve test photos as PIL images, their labels, and logits of the demo CLIP, by hand."""
    images, labels = demo.split("test")
    chosen = torch.arange(0, 510, 43)
    clip = clip_min.load("demo")
    tokens = clip_min.tokenize([demo.TEMPLATE.format(name) for name in NAMES])
    with torch.no_grad():
        logits = clip(clip_min.normalize(images[chosen]), tokens)
    method = METHODS["zero_shot"].plain(clip, NAMES, demo.TEMPLATE)
    pictures = [tv.to_pil_image(image) for image in images[chosen]]
    return Filter(method, "zero_shot", ""), pictures, labels[chosen], logits


def test_predictions_and_margins_are_zero_shots(seen):
    judge, pictures, labels, logits = seen
    predicted, found = zip(*judge(pictures, labels.tolist()), strict=True)
    assert list(predicted) == logits.argmax(dim=1).tolist()
    for i, label in enumerate(labels.tolist()):
        others = torch.cat([logits[i, :label], logits[i, label + 1 :]])
        assert found[i] == pytest.approx((logits[i, label] - others.max()).item(), abs=1e-3)
        assert (found[i] > 0) == (predicted[i] == label)
    assert 0 < (torch.tensor(predicted) == labels).sum() < 12


def test_one_at_a_time_is_the_same(seen):
    judge, pictures, labels, _ = seen
    predicted, found = zip(*judge(pictures, labels.tolist()), strict=True)
    for i, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        ((one, margin),) = judge([picture], [label])
        assert (one, margin) == (predicted[i], pytest.approx(found[i], abs=1e-3))


def test_a_batch_costs_no_hash_of_all_weights(seen, monkeypatch):
    """Only a cache of features needs one, for their name, and nothing is kept here."""
    judge, pictures, labels, _ = seen
    monkeypatch.setattr(clip_min.weights, "fingerprint", None)
    judge(pictures, labels.tolist())


def test_margin_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, -2.0, 5.0]])
    assert margins(logits, torch.tensor([0, 1])).tolist() == [0.5, -7.0]
