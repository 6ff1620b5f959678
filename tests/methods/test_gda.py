"""GDA against its published formulas in numpy, and scikit-learn's discriminant analysis."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from clip_min import normalize
from methods.gda import ALPHAS, GDA
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy", "dahlia"]
NOVEL = ["sweet pea", "moon orchid", "tiger lily"]
TEMPLATE = "a photo of a {}."


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def draw(n: int, seed: int):
    """features (n, 32), nearer to those of their own class than to others; labels (n,)."""
    rng = torch.Generator().manual_seed(seed)
    middles = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % 4
    return middles[labels] + 1.5 * torch.randn(n, 32, generator=rng), labels


def gda(clip, **settings) -> GDA:
    return GDA(clip, NAMES, TEMPLATE, GDA.Settings(**settings))


def zero_shot(clip, names, x) -> np.ndarray:
    return numbers(ZeroShot.plain(clip, names, TEMPLATE).classify(x))


def published(x: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """f·w_k + b_k as in main_few_shots.py of its repository."""
    classes, size = labels.max() + 1, x.shape[1]
    mus = np.stack([x[labels == k].mean(0) for k in range(classes)])
    centred = np.concatenate([x[labels == k] - mus[k] for k in range(classes)])
    cov = np.cov(centred.T)
    precision = size * np.linalg.pinv((len(x) - 1) * cov + np.trace(cov) * np.eye(size))
    bias = np.log(1 / classes) - np.einsum("nd,dc,nc->n", mus, precision, mus) / 2
    return queries @ precision @ mus.T + bias


def level(logits: np.ndarray) -> np.ndarray:
    """Logits without what is added to all of an image's, which decides nothing."""
    return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("count", [8, 30, 400])  # fewer than features, unequal classes, more
def test_logits_are_the_published_ones_but_for_a_number_of_each_image(count, new_clip, pictures):
    clip, (x, labels), (queries, _) = new_clip(), draw(count, 1), draw(7, 2)
    method = gda(clip, alpha=0.3)
    method.fit(pictures(x, labels), None, descend=None)
    gaussian = published(unit(numbers(x)), labels.numpy(), unit(numbers(queries)))
    expected = level(zero_shot(clip, NAMES, queries) + 0.3 * gaussian)
    np.testing.assert_allclose(level(numbers(method.classify(queries))), expected, atol=1e-3)
    np.testing.assert_allclose(level(numbers(method.classify(9 * queries))), expected, atol=1e-3)
    with method.inference():
        kept = numbers(method.classify(queries))
    np.testing.assert_array_equal(kept, numbers(method.classify(queries)))


@pytest.mark.parametrize("count", [12, 80])
def test_gaussians_are_those_of_scikit_learns_shrunk_discriminant(count, new_clip, pictures):
    """Its shrinkage E/(n - 1 + E) is the same direction; ours is shorter by the same factor."""
    (x, labels), (queries, _) = draw(count, 1), draw(7, 2)
    method = gda(new_clip())
    method.remember(pictures(x, labels))
    size = 32
    lda = LinearDiscriminantAnalysis("lsqr", shrinkage=size / (count - 1 + size))
    lda.fit(unit(numbers(x)), labels.numpy())
    theirs = lda.decision_function(unit(numbers(queries)))
    theirs = theirs * size / (count - 1 + size) * (count - 1) / count
    np.testing.assert_allclose(level(numbers(method.ratios(queries))), level(theirs), atol=1e-4)


def test_alpha_0_and_classes_without_images_are_zero_shot_to_the_bit(new_clip, pictures):
    clip, (queries, _) = new_clip(), draw(7, 2)
    method = gda(clip, alpha=0.0)
    plain = ZeroShot.plain(clip, NAMES, TEMPLATE).classify(queries)
    assert torch.equal(method.classify(queries), plain)  # before it has seen any image
    method.remember(pictures(*draw(9, 1)))
    assert torch.equal(method.classify(queries), plain)
    method.alpha.fill_(5.0)
    plain = ZeroShot.plain(clip, NOVEL, TEMPLATE).classify(queries)
    assert torch.equal(method.for_classes(NOVEL).classify(queries), plain)


@pytest.mark.parametrize("novel", ["zero-shot", "neighbours"])
def test_a_class_keeps_its_gaussian_among_any_names(novel, new_clip, pictures):
    method, (queries, _) = gda(new_clip(), alpha=5.0, novel=novel), draw(7, 2)
    method.remember(pictures(*draw(30, 1)))
    before = method.classify(queries)
    with method.inference():
        mixed = method.for_classes(["sweet pea", "dahlia", "rose", "dahlia"])
        torch.testing.assert_close(mixed.classify(queries)[:, 1:], before[:, [3, 0, 3]])


def test_the_mean_of_all_classes_is_as_likely_under_a_class_as_outside_it(new_clip, pictures):
    """Where f is in the middle between a class and μ, the ratio is 0, and at μ_k above it."""
    x, labels = draw(40, 1)
    method = gda(new_clip())
    method.remember(pictures(x, labels))
    means = np.stack([unit(numbers(x))[labels == k].mean(0) for k in range(4)])
    w, b = map(numbers, method.gaussians())
    halfway = (means + means.mean(0)) / 2
    np.testing.assert_allclose((halfway * w).sum(1) + b, 0, atol=1e-4)
    assert ((means * w).sum(1) + b > 1).all()


@pytest.mark.parametrize("count", [20, 100])  # fewer images than neighbours, and more
def test_new_classes_have_the_published_gaussians_of_their_neighbours(count, new_clip, pictures):
    """main_base2new.py of its repository."""
    clip, (x, labels), (queries, _) = new_clip(), draw(count, 1), draw(7, 2)
    method = gda(clip, alpha=0.5, novel="neighbours")
    method.remember(pictures(x, labels))
    vecs, f = unit(numbers(x)), unit(numbers(queries))
    text = unit(numbers(ZeroShot.plain(clip, NOVEL, TEMPLATE).class_features()))
    means, inverses = [], []
    for w in text:
        near = vecs[np.argsort(-vecs @ w)[:64]]
        means.append(np.concatenate([near, np.tile(w, (16, 1))]).mean(0))
        cov = (near - w).T @ (near - w) / (len(near) - 1)
        inverses.append(np.linalg.pinv((len(near) - 1) * cov + np.trace(cov) * np.eye(32)))
    mu, precision = np.stack(means), 32 * np.mean(inverses, axis=0)
    gaussian = f @ precision @ mu.T - np.einsum("nd,dc,nc->n", mu, precision, mu) / 2
    expected = level(zero_shot(clip, NOVEL, queries) + 0.5 * gaussian)
    found = numbers(method.for_classes(NOVEL).classify(queries))
    np.testing.assert_allclose(level(found), expected, atol=1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_alpha_is_the_smallest_of_the_best_on_validation(seed, new_clip, pictures):
    clip, (x, labels), (val, right) = new_clip(), draw(16, seed), draw(40, seed + 10)
    method = gda(clip)
    method.fit(pictures(x, labels), pictures(val, right), descend=None)
    gaussian = published(unit(numbers(x)), labels.numpy(), unit(numbers(val)))
    plain, best = zero_shot(clip, NAMES, val), (-1.0, None)
    for alpha in ALPHAS:
        found = ((plain + alpha * gaussian).argmax(1) == right.numpy()).mean()
        best = max(best, (found, alpha), key=lambda pair: pair[0])
    assert method.alpha.item() == pytest.approx(best[1])
    assert best[0] > (plain.argmax(1) == right.numpy()).mean()  # the Gaussians do help here


def test_gaussians_that_do_not_help_get_the_least_weight(new_clip, pictures):
    """Zero-shot is right about all of validation."""
    method = gda(new_clip())
    text = method.class_features()
    method.fit(pictures(*draw(16, 1)), pictures(text, [0, 1, 2, 3]), descend=None)
    assert method.alpha == pytest.approx(ALPHAS[0])


def test_one_image_a_class_is_told_apart_by_the_spread_of_all(new_clip, pictures):
    method, (x, labels) = gda(new_clip(), alpha=100.0), draw(4, 1)
    method.remember(pictures(x, labels))
    assert method.classify(x).argmax(dim=1).tolist() == labels.tolist()
    method.remember(pictures(x[[0, 0, 0, 0]], labels))  # no spread at all
    torch.testing.assert_close(method.ratios(x), torch.zeros(4, 4))


def test_every_random_view_is_an_image_of_its_own(new_clip):
    """Two views of three pictures; the drawing of views is replaced by known ones."""
    clip, labels = new_clip(), torch.tensor([0, 1, 0])
    views = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=torch.manual_seed(4)).byte()
    left = list(views)

    class Views(SimpleNamespace):
        def __len__(self):
            return 3

    train = Views(
        labels=labels,
        images=lambda chosen, augment: normalize(left.pop(0)[chosen]),
        autocast=contextlib.nullcontext,
    )
    method = gda(clip, augment="crop-flip", views=2, alpha=1.0)
    method.fit(train, None, descend=None)
    with torch.no_grad():
        each = np.concatenate([unit(numbers(clip.encode_image(normalize(v)))) for v in views])
    np.testing.assert_allclose(numbers(method.support), each, atol=1e-5)
    assert method.support_labels.tolist() == [0, 1, 0, 0, 1, 0]


def test_the_paper_recipe_is_the_published_one():
    s = GDA.Settings(**GDA.recipes["paper"])
    assert (s.augment, s.views, s.novel, s.alpha) == ("crop-flip", 10, "neighbours", -1)
