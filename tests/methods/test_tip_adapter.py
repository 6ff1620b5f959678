"""Tip-Adapter's logits by the formula and its grid by a double loop, in numpy."""

import contextlib

import numpy as np
import pytest
import torch

from clip_min import normalize
from methods import tip_adapter
from methods.tip_adapter import (
    ALPHAS,
    BETAS,
    TipAdapter,
    TipAdapterF,
    winning,
)
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy", "dahlia"]
TEMPLATE = "a photo of a {}."


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def draw(n: int, seed: int, classes: int = 4):
    """features (N, 32), nearer to those of their own class than to others; labels (N,)."""
    rng = torch.Generator().manual_seed(seed)
    middles = torch.randn(classes, 32, generator=torch.Generator().manual_seed(5))
    labels = torch.randint(classes, (n,), generator=rng)
    return middles[labels] + 1.5 * torch.randn(n, 32, generator=rng), labels


def tip(clip, kind=TipAdapter, **settings):
    return kind(clip, NAMES, TEMPLATE, kind.Settings(**settings))


def by_hand(method, features, support, labels, alpha: float, beta: float) -> np.ndarray:
    f, keys = unit(numbers(features)), unit(numbers(support))
    text = unit(numbers(method.class_features()))
    logits = np.exp(numbers(method.clip.logit_scale)) * f @ text.T
    for n, key in enumerate(keys):  # every key votes for its class
        logits[:, labels[n]] += alpha * np.exp(-beta * (1 - f @ key))
    return logits


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 5.5), (20.0, 1.0), (3.0, 0.0), (0.0, 2.0)])
def test_logits_are_the_formulas(alpha, beta, new_clip, pictures):
    method, (x, labels), (queries, _) = (
        tip(new_clip(), alpha=alpha, beta=beta),
        *map(draw, (9, 7), (1, 2)),
    )
    method.fit(pictures(x, labels), pictures(*draw(5, 3)), descend=None)
    expected = by_hand(method, queries, x, labels, alpha, beta)
    np.testing.assert_allclose(numbers(method.classify(queries)), expected, atol=1e-4)


def naive_search(method, train, val, alphas=ALPHAS, betas=BETAS):
    """The best on validation; of equally good ones that with the smallest α, then β."""
    best = None
    for alpha in sorted(alphas):
        for beta in sorted(betas):
            logits = by_hand(method, val[0], *train, alpha, beta)
            right = (logits.argmax(axis=1) == val[1].numpy()).mean()
            if best is None or right > best[0]:
                best = right, alpha, beta
    return best


@pytest.mark.parametrize("fixed", [{}, {"alpha": 2.0}, {"beta": 3.0}])
@pytest.mark.parametrize("few", [3 * 16, 2**24])  # validation images at once x training images
@pytest.mark.parametrize("seed", [1, 2])
def test_alpha_and_beta_are_those_of_a_double_loop_over_validation(
    seed, few, fixed, new_clip, pictures, monkeypatch
):
    monkeypatch.setattr(tip_adapter, "ROOM", few)
    train, val = draw(16, seed), draw(40, seed + 10)
    method = tip(new_clip(), **fixed)
    method.fit(pictures(*train), pictures(*val), descend=None)
    grid = {f"{name}s": [value] for name, value in fixed.items()}
    right, alpha, beta = naive_search(method, train, val, **grid)
    assert (method.alpha.item(), method.beta.item()) == pytest.approx((alpha, beta))
    assert method.alpha > 0  # the votes do help here
    zero_shot = ZeroShot.plain(method.clip, NAMES, TEMPLATE).classify(val[0]).argmax(dim=1)
    assert right > (zero_shot == val[1]).double().mean()


def test_the_search_looks_at_a_bounded_number_of_validation_images(new_clip, pictures, monkeypatch):
    """Every third of 40, where 14 are the most that are looked at."""
    monkeypatch.setattr(tip_adapter, "SEARCHED", 14)
    train, val = draw(16, 1), draw(40, 11)
    method = tip(new_clip())
    method.fit(pictures(*train), pictures(*val), descend=None)
    _, alpha, beta = naive_search(method, train, (val[0][::3], val[1][::3]))
    assert (method.alpha.item(), method.beta.item()) == pytest.approx((alpha, beta))


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_where_the_right_class_wins_is_where_it_has_the_largest_logit(beta, new_clip, pictures):
    """β = 0: as many votes for all images of a class, and many classes with as many."""
    method, (queries, labels) = tip(new_clip()), draw(200, 2)
    method.remember(pictures(*draw(16, 1)))
    with torch.no_grad():
        zero_shot = ZeroShot.classify(method, queries).double()
        votes = method.cache_logits(queries, beta).double()
    low, high = winning(zero_shot, votes, labels)
    for alpha in ALPHAS:
        logits = zero_shot + alpha * votes
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        right = logits.gather(1, labels[:, None])[:, 0] > others
        assert torch.equal((low < alpha) & (alpha < high), right)


def test_votes_are_counted_as_by_the_matrix_of_them(new_clip, pictures):
    """Of classes asked for that have images, none, or the name of another; and of no images."""
    method, x = tip(new_clip()), torch.rand(9, 5)
    method.remember(pictures(*draw(9, 1)))
    for names in (NAMES, ["sweet pea", "dahlia", "rose", "dahlia"]):
        asked = method.for_classes(names)
        torch.testing.assert_close(asked.count_votes(x), asked.votes().T @ x)
    assert tip(new_clip()).count_votes(torch.rand(0, 5)).tolist() == [[0] * 5] * 4


def test_votes_that_do_not_help_get_no_weight(new_clip, pictures):
    """Zero-shot is right about all of validation: α = 0, the smallest of the equally good."""
    method = tip(new_clip())
    text = method.class_features()
    method.fit(pictures(*draw(16, 1)), pictures(text, [0, 1, 2, 3]), descend=None)
    assert (method.alpha, method.beta) == (0, BETAS[0])


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_alpha_0_is_zero_shot_to_the_bit(kind, new_clip, pictures):
    clip, (queries, _) = new_clip(), draw(7, 2)
    method = tip(clip, kind, alpha=0.0, beta=4.0)
    zero_shot = ZeroShot.plain(clip, NAMES, TEMPLATE).classify(queries)
    assert torch.equal(method.classify(queries), zero_shot)  # before it has seen any image
    method.remember(pictures(*draw(9, 1)))
    assert torch.equal(method.classify(queries), zero_shot)


def test_classes_without_images_get_no_votes(new_clip, pictures):
    clip, (queries, _) = new_clip(), draw(7, 2)
    method = tip(clip, alpha=5.0, beta=2.0)
    method.remember(pictures(*draw(9, 1)))
    novel = ["sweet pea", "moon orchid", "tiger lily"]
    expected = ZeroShot.plain(clip, novel, TEMPLATE).classify(queries)
    assert torch.equal(method.for_classes(novel).classify(queries), expected)


def test_a_class_keeps_its_votes_wherever_its_name_stands(new_clip, pictures):
    clip, (queries, _), (x, labels) = new_clip(), draw(7, 2), draw(9, 1)
    method = tip(clip, alpha=5.0, beta=2.0)
    method.remember(pictures(x, labels))
    before = method.classify(queries)
    order = [2, 0, 3, 1]
    moved = method.for_classes([NAMES[k] for k in order]).classify(queries)
    torch.testing.assert_close(moved, before[:, order])
    mixed = method.for_classes(["sweet pea", "dahlia", "rose"]).classify(queries)
    torch.testing.assert_close(mixed[:, 1:], before[:, [3, 0]])
    alone = ZeroShot.plain(clip, ["sweet pea"], TEMPLATE).classify(queries)
    torch.testing.assert_close(mixed[:, :1], alone)
    again = (
        method.for_classes(NAMES[:2]).for_classes(NAMES).classify(queries)
    )  # nothing was forgotten
    assert torch.equal(again, before)


def test_a_name_asked_for_twice_gets_its_votes_in_both_places(new_clip, pictures):
    method, (queries, _) = tip(new_clip(), alpha=5.0, beta=2.0), draw(7, 2)
    method.remember(pictures(*draw(9, 1)))
    twice = method.for_classes(["rose", "dahlia", "rose"]).classify(queries)
    torch.testing.assert_close(twice, method.classify(queries)[:, [0, 3, 0]])


def test_two_classes_of_one_name_keep_the_images_of_each(new_clip, pictures):
    clip, (queries, _) = new_clip(), draw(7, 2)
    both = TipAdapter(clip, ["crane", "rose", "crane"], TEMPLATE, TipAdapter.Settings())
    apart = TipAdapter(clip, ["bird", "rose", "crane"], TEMPLATE, TipAdapter.Settings())
    for method in (both, apart):
        method.remember(pictures(draw(9, 1)[0], [0, 0, 2, 1, 2, 1, 1, 0, 2]))
    votes = both.cache_logits(queries, 2.0)
    torch.testing.assert_close(votes, apart.cache_logits(queries, 2.0))
    assert (votes[:, 0] - votes[:, 2]).abs().max() > 1e-3


def test_gradients_reach_the_keys_alone(new_clip, pictures):
    method = tip(new_clip(), TipAdapterF, alpha=5.0, beta=2.0)
    (x, labels), (queries, right) = draw(9, 1), draw(7, 2)
    method.remember(pictures(x, labels))
    method.loss(queries, right).backward()
    assert [n for n, p in method.named_parameters() if p.grad is not None] == ["support"]
    keys = torch.tensor(unit(numbers(x)), requires_grad=True)  # and they are the formula's
    f, text = (torch.tensor(unit(numbers(t))) for t in (queries, method.class_features()))
    votes = (-2 * (1 - f @ keys.T)).exp() @ torch.eye(4, dtype=torch.float64)[labels]
    logits = method.clip.logit_scale.exp().double() * f @ text.T + 5 * votes
    torch.nn.functional.cross_entropy(logits, right).backward()
    torch.testing.assert_close(method.support.grad.double(), keys.grad, atol=1e-5, rtol=1e-4)


def test_after_training_the_keys_alpha_and_beta_are_searched_again(new_clip, pictures):
    train, val = draw(16, 1), draw(40, 11)
    method, seen = tip(new_clip(), TipAdapterF), {}

    def descend(same, *given):
        assert same is method
        seen["first"] = (method.alpha.item(), method.beta.item())
        seen["given"] = given
        with torch.no_grad():  # keys that say the opposite
            method.support.neg_()

    batches = pictures(*train), pictures(*val)
    method.fit(*batches, descend)
    assert seen["given"] == batches
    assert seen["first"] == pytest.approx(naive_search(method, train, val)[1:])
    last = naive_search(method, (-train[0], train[1]), val)[1:]
    assert (method.alpha.item(), method.beta.item()) == pytest.approx(last)
    assert last != pytest.approx(seen["first"])


@pytest.mark.parametrize("asked", [-1.0, 0.0])
def test_keys_are_trained_even_where_their_votes_did_not_help_yet(asked, new_clip, pictures):
    """Zero-shot is right about all of validation: the search says α = 0. An α asked for stays."""
    method, train = tip(new_clip(), TipAdapterF, alpha=asked), draw(16, 1)
    val = pictures(method.class_features(), [0, 1, 2, 3])
    moved = []

    def descend(same, *given):
        method.loss(*train).backward()
        moved.append(bool(method.support.grad.abs().max() > 0))

    method.fit(pictures(*train), val, descend)
    assert moved == [asked < 0]
    assert method.alpha == 0  # the search after training goes by validation again


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_an_adapter_of_another_number_of_images_loads(kind, new_clip, pictures):
    queries, _ = draw(7, 2)
    trained = tip(new_clip(), kind, alpha=5.0, beta=2.0)
    trained.remember(pictures(*draw(9, 1)))
    state = {name: t.detach().clone() for name, t in trained.adapter_state().items()}
    for images in (0, 4):
        fresh = tip(new_clip(), kind)
        if images:
            fresh.remember(pictures(*draw(images, 3)))
        fresh.load_adapter(state)
        assert torch.equal(fresh.classify(queries), trained.classify(queries))
        assert {n for n, p in fresh.named_parameters() if p.requires_grad} == (
            {"support"} if kind is TipAdapterF else set()
        )


@pytest.mark.parametrize("augment", ["crop-flip", "randaugment"])
@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
def test_keys_of_random_views_are_the_mean_of_their_features(kind, augment, new_clip, pictures):
    """Two views of three pictures; the drawing of views is replaced by known ones.

    The features are not normalised before the mean, as in the published code.
    """
    clip, labels = new_clip(), torch.tensor([0, 1, 0])
    views = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=torch.manual_seed(4)).byte()

    class Views:
        def __init__(self):
            self.left, self.labels = list(views), labels

        def __len__(self):
            return 3

        def images(self, chosen, augment):
            asked.append(augment)
            return normalize(self.left.pop(0)[chosen])

        def autocast(self):
            return contextlib.nullcontext()

    asked = []
    method = tip(clip, kind, augment=augment, views=2)
    method.fit(Views(), pictures(*draw(5, 3)), descend=lambda *_: None)
    assert asked == [augment, augment]
    with torch.no_grad():
        each = [numbers(clip.encode_image(normalize(view))) for view in views]
    np.testing.assert_allclose(numbers(method.support), unit(sum(each)), atol=1e-5)
    units = unit(sum(map(unit, each)))
    assert np.abs(units - unit(sum(each))).max() > 1e-3  # else this would show nothing


def test_the_paper_recipes_are_the_published_ones():
    """Ten random views of an image for its key; the keys are trained in 20 epochs of AdamW."""
    s = TipAdapter.Settings(**TipAdapter.recipes["paper"])
    assert (s.views, s.augment, s.alpha, s.beta) == (10, "crop-flip", -1, -1)
    s = TipAdapterF.Settings(**TipAdapterF.recipes["paper"])
    assert (s.views, s.augment, s.alpha, s.beta) == (10, "crop-flip", -1, -1)
    assert (s.optimizer, s.lr, s.eps, s.epochs, s.batch_size) == ("adamw", 1e-3, 1e-4, 20, 256)
