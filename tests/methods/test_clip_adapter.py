"""CLIP-Adapter's logits by the formula, in numpy."""

from math import log

import numpy as np
import pytest
import torch

from clip_min import UserError
from methods.clip_adapter import ClipAdapter, ClipAdapterSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."


def adapter(clip, **settings) -> ClipAdapter:
    torch.manual_seed(2)
    return ClipAdapter(clip, NAMES, TEMPLATE, ClipAdapterSettings(**settings))


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def adapted(x: np.ndarray, weights: list[np.ndarray], r: float) -> np.ndarray:
    """r·relu(relu(x W₁ᵀ) W₂ᵀ) + (1 - r)·x"""
    down, up = weights
    return r * np.maximum(np.maximum(x @ down.T, 0) @ up.T, 0) + (1 - r) * x


def by_hand(method: ClipAdapter, features, ratios: dict[str, float]) -> np.ndarray:
    state = {name: numbers(tensor) for name, tensor in method.adapter_state().items()}
    x = {"image": numbers(features), "text": numbers(method.class_features())}
    for side, r in ratios.items():
        weights = [state[f"adapters.{side}.layers.{i}.weight"] for i in (0, 2)]
        x[side] = adapted(x[side], weights, r)
    unit = {side: y / np.linalg.norm(y, axis=1, keepdims=True) for side, y in x.items()}
    return np.exp(numbers(method.clip.logit_scale)) * unit["image"] @ unit["text"].T


@pytest.fixture
def features(new_clip, images):
    with torch.no_grad():
        return new_clip().encode_image(images)


@pytest.mark.parametrize("ratio", [0.2, 0.9, 1.0])
@pytest.mark.parametrize("adapters", ["image", "text", "both"])
def test_logits_are_the_formulas(adapters, ratio, new_clip, features):
    method = adapter(new_clip(), adapters=adapters, ratio=ratio)
    sides = ["image", "text"] if adapters == "both" else [adapters]
    expected = {f"adapters.{side}.layers.{i}.weight" for side in sides for i in (0, 2)}
    assert set(method.adapter_state()) == expected  # no biases, and no r
    logits = by_hand(method, features, dict.fromkeys(sides, ratio))
    np.testing.assert_allclose(numbers(method.classify(features)), logits, atol=1e-4)


def test_a_learned_ratio_is_the_sigmoid_of_a_free_number_for_each_side(new_clip, features):
    method = adapter(new_clip(), adapters="both", ratio=0.3, learn_ratio=True)
    free = {side: method.adapters[side].free for side in ("image", "text")}
    for side in free:
        assert free[side].item() == pytest.approx(log(0.3 / 0.7))  # it starts at r
        assert f"adapters.{side}.free" in method.adapter_state()
    start = by_hand(method, features, {"image": 0.3, "text": 0.3})
    np.testing.assert_allclose(numbers(method.classify(features)), start, atol=1e-4)
    with torch.no_grad():
        free["image"].fill_(1.0)
        free["text"].fill_(-2.0)
    ratios = {"image": 1 / (1 + np.exp(-1)), "text": 1 / (1 + np.exp(2))}
    np.testing.assert_allclose(
        numbers(method.classify(features)), by_hand(method, features, ratios), atol=1e-4
    )
    method.loss(features, torch.tensor([0, 1, 2, 0, 1])).backward()
    assert all(number.grad != 0 for number in free.values())


@pytest.mark.parametrize("adapters", ["image", "text", "both"])
def test_ratio_0_is_zero_shot_to_the_bit(adapters, new_clip, features):
    clip = new_clip()
    method = adapter(clip, adapters=adapters, ratio=0.0)
    assert torch.equal(
        method.classify(features), ZeroShot.plain(clip, NAMES, TEMPLATE).classify(features)
    )


@pytest.mark.parametrize(("reduction", "hidden"), [(4, 8), (1, 32), (5, 6), (100, 1)])
def test_the_layers_are_e_over_the_reduction_wide(reduction, hidden, new_clip):
    state = adapter(new_clip(), reduction=reduction).adapter_state()
    assert {t.shape for t in state.values()} == {(hidden, 32), (32, hidden)}


def test_the_paper_recipe_is_the_published_one():
    s = ClipAdapterSettings(**ClipAdapter.recipes["paper"])
    assert (s.ratio, s.reduction, s.adapters, s.learn_ratio) == (0.2, 4, "image", False)
    assert (s.optimizer, s.lr, s.epochs, s.augment) == ("sgd", 2e-3, 200, "crop-flip")


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_learned_ratio_cannot_start_where_its_gradient_is_0(ratio):
    with pytest.raises(
        UserError, match=f"--ratio {ratio}: --learn-ratio needs a start between 0 and 1"
    ):
        ClipAdapterSettings(ratio=ratio, learn_ratio=True)
