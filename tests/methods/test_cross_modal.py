"""Cross-modal adaptation: logits and loss by their formulas, in numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fewshot.batches import Batches
from fewshot.loop import descend, shuffled
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from methods.cross_modal import CrossModal, CrossModalSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy", "dahlia"]
TEMPLATE = "a photo of a {}."


@pytest.fixture
def features(new_clip, images):
    with torch.no_grad():
        return new_clip().encode_image(images)


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def trained(clip) -> CrossModal:
    method = CrossModal(clip, NAMES, TEMPLATE, CrossModalSettings())
    with torch.no_grad():
        method.head += 0.3 * torch.randn(method.head.shape, generator=torch.manual_seed(3))
    return method


def test_logits_are_the_scaled_products_of_unit_features_and_the_head(new_clip, features):
    method = trained(new_clip())
    scale = np.exp(numbers(method.clip.logit_scale))
    logits = scale * unit(numbers(features)) @ numbers(method.head).T  # whose rows are not unit
    np.testing.assert_allclose(numbers(method.classify(features)), logits, atol=1e-4)
    np.testing.assert_allclose(numbers(method.classify(9 * features)), logits, atol=1e-4)


def test_the_loss_is_over_images_and_as_many_texts(new_clip, features):
    method, labels = trained(new_clip()), torch.tensor([0, 1, 2, 3, 0])
    for method.step in range(3):
        loss, drawn = method.loss(features, labels), method.texts()[:5].tolist()
        texts = numbers(method.class_features())[drawn]
        samples = unit(np.concatenate([numbers(features), texts]))  # (10, E)
        right = labels.tolist() + drawn
        logits = np.exp(numbers(method.clip.logit_scale)) * samples @ numbers(method.head).T
        terms = [np.log(np.exp(row).sum()) - row[k] for row, k in zip(logits, right, strict=True)]
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 51, 60])
def test_texts_come_in_shuffled_passes_whose_incomplete_batch_is_dropped(count, new_clip):
    clip, names, drawn = new_clip(), [f"flower {k}" for k in range(51)], []
    steps = max(1, 51 // count)
    for seed in range(2):
        torch.manual_seed(seed)
        method = CrossModal(clip, names, TEMPLATE, CrossModalSettings(batch_size=count))
        for epoch in range(3):
            texts = []
            for method.step in range(epoch * steps, (epoch + 1) * steps):
                texts += method.texts().tolist()
            assert len(texts) == steps * count
            seen = np.bincount(texts, minlength=51)
            assert seen.max() - seen.min() <= 1  # each class once, but for the rest
            drawn.append(tuple(texts))
        assert tuple(method.texts().tolist()) == drawn[-1][-count:]  # however often it is asked
    assert len(set(drawn)) == 6  # in another order each time


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_are_not_in_the_order_of_as_many_images(seed, new_clip):
    names = [f"flower {k}" for k in range(51)]
    torch.manual_seed(seed)
    method = CrossModal(new_clip(), names, TEMPLATE, CrossModalSettings(batch_size=16))
    pixels = torch.zeros(51, 3, 32, 32, dtype=torch.uint8)
    train = Batches(Pictures(pixels, torch.arange(51)), pixels, Reader(32, folder=None))
    for epoch in range(3):
        method.step = 3 * epoch
        images = shuffled(train, 16, seed, epoch)[0]
        assert set(images.tolist()) != set(method.texts().tolist())


def test_the_loop_counts_the_steps_that_texts_follow(new_clip, tmp_path, monkeypatch):
    """Over all epochs, the last of whose steps has fewer images."""
    method, seen = trained(new_clip()), []
    method.settings = CrossModalSettings(batch_size=2, epochs=4, patience=0)
    texts = method.texts
    monkeypatch.setattr(method, "texts", lambda: (seen.append(method.step), texts())[1])
    pixels = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    train = Batches(Pictures(pixels, torch.arange(5) % 4), pixels, Reader(32, folder=None))
    config = ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"]
    descend(method, train, train, Run.start(tmp_path / "run", dict.fromkeys(config, "x")), 1)
    assert seen == list(range(12))


def test_with_mirror_it_also_learns_from_mirror_images(new_clip):
    pixels = torch.randint(0, 255, (3, 3, 32, 32), generator=torch.manual_seed(1)).byte()
    train = Batches(Pictures(pixels, torch.tensor([2, 0, 1])), pixels, Reader(32, folder=None))
    given = {}
    for mirror in (False, True):
        method = CrossModal(new_clip(), NAMES, TEMPLATE, CrossModalSettings(mirror=mirror))
        method.fit(train, None, lambda _, images, __, key=mirror: given.update({key: images}))
    assert given[False] is train
    assert torch.equal(given[True].pixels, torch.cat([pixels, pixels.flip(3)]))
    assert given[True].labels.tolist() == [2, 0, 1, 2, 0, 1]


def test_before_the_first_step_it_is_zero_shot(new_clip, features):
    clip = new_clip()
    method = CrossModal(clip, NAMES, TEMPLATE, CrossModalSettings(templates="a {}.|the {}"))
    head = F.normalize(method.class_features(), dim=-1)
    assert torch.equal(method.head, head)
    method = CrossModal(clip, NAMES, TEMPLATE, CrossModalSettings())
    zero_shot = ZeroShot.plain(clip, NAMES, TEMPLATE).classify(features)
    torch.testing.assert_close(method.classify(features), zero_shot)


def test_texts_alone_would_teach_it_too(new_clip, features):
    """Gradients of a class without images in the batch come from its text."""
    method = trained(new_clip())
    optimizer = torch.optim.AdamW([method.head], lr=1e-2)
    for method.step in range(60):
        optimizer.zero_grad()
        method.loss(features[:4], torch.tensor([0, 0, 1, 1])).backward()
        optimizer.step()
    best = method.classify(method.class_features()).argmax(dim=1)
    assert best.tolist() == [0, 1, 2, 3]
