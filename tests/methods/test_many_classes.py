"""10,000 names in one classifier: each has the logit it has among few, and training goes on."""

import itertools

import pytest
import torch

from clip_min import UserError
from methods import METHODS
from methods.gda import ALPHAS
from methods.linear_probe import logistic_regression
from methods.tip_adapter import SEARCHED

WORDS = ("red", "blue", "tall", "wild", "small", "late", "sweet", "sea", "sun", "rock")
NAMES = [" ".join(words) for words in itertools.product(WORDS, WORDS, WORDS, WORDS)]


@pytest.mark.parametrize("name", ["zero_shot", "coop", "kgcoop", "lora", "clip_adapter"])
def test_logits_and_gradients_of_10_000_names(name, new_clip, images):
    kind = METHODS[name]
    torch.manual_seed(0)
    method = kind(new_clip(), NAMES, "a photo of a {}.", kind.Settings())
    x, some = method.encode(images), slice(7, None, 1000)
    with method.inference():
        logits = method.classify(x)
    few = method.for_classes(NAMES[some])
    with few.inference():
        torch.testing.assert_close(logits[:, some], few.classify(x), rtol=1e-4, atol=1e-4)
    assert logits.shape == (len(images), 10_000)
    if learned := [p for p in method.parameters() if p.requires_grad]:
        method.loss(x, torch.arange(len(images))).backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in learned)
        assert all(p.grad is None or p.grad.isfinite().all() for p in learned)


def test_gda_chooses_on_some_images_a_part_at_a_time(new_clip, pictures, monkeypatch):
    clip = new_clip()
    classes, count = 40, 2 * SEARCHED
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, clip.config.embed_dim, generator=rng)

    def drawn(n: int):
        labels = torch.arange(n) % classes
        noise = torch.randn(n, clip.config.embed_dim, generator=rng)
        return pictures(centres[labels] + 2 * noise, labels)

    train, val = drawn(4 * classes), drawn(count)
    kind = METHODS["gda"]
    method = kind(clip, NAMES[:classes], "{}", kind.Settings())
    monkeypatch.setattr("methods.gda.ROOM", 7 * classes)  # 7 images at once
    method.fit(train, val, None)
    chosen, x, labels = method.alpha.item(), val.encoded(method)[::2], val.labels[::2]
    right = {}
    for alpha in ALPHAS:
        method.alpha.fill_(alpha)
        right[alpha] = (method.classify(x).argmax(dim=1) == labels).sum().item()
    assert chosen == pytest.approx(max(ALPHAS, key=right.get))
    assert len(set(right.values())) > 2


def test_what_grows_with_the_square_of_the_classes_is_refused_before_work(new_clip, monkeypatch):
    kind, clip = METHODS["em_dirichlet"], new_clip()
    monkeypatch.setattr("methods.em_dirichlet.free_memory", lambda device: 10e9)
    with pytest.raises(UserError, match=r"10,000 classes.* take 13\.6 GB of memory, but 10\.0 GB"):
        kind(clip, NAMES, "a photo of a {}.", kind.Settings())
    method = kind(clip, NAMES[:50], "a photo of a {}.", kind.Settings())
    with pytest.raises(UserError, match="give fewer"):
        method.for_classes(NAMES)


def test_a_probe_is_solved_a_part_at_a_time_as_at_once(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 8, generator=rng), torch.arange(60) % 5
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.5])
    at_once = logistic_regression(x, labels, 5, 0.1, weights=weights)
    monkeypatch.setattr("methods.linear_probe.ROOM", 35)  # 7 images at once
    for one, other in zip(
        logistic_regression(x, labels, 5, 0.1, weights=weights), at_once, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
