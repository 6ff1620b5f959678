"""The probe against scikit-learn, its optimality conditions, and a naive search for C."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fewshot.batches import Batches
from methods import linear_probe
from methods.linear_probe import LinearProbe, LinearProbeSettings, logistic_regression

SHAPES = [(60, 5, 3), (40, 30, 4), (12, 20, 5)]  # N, E, K; the last is separable


def samples(n: int, embed: int, classes: int, seed: int = 0, noise: float = 2.0):
    """Overlapping clouds: x (N, E), labels (N,), every class among them."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    middles = torch.randn(classes, embed, generator=torch.Generator().manual_seed(9))
    return middles[labels] + noise * torch.randn(n, embed, generator=rng), labels


def scikit(x, labels, c: float, balance: str | None = None):
    x = x.double().numpy()
    model = LogisticRegression(
        C=c, class_weight=balance, solver="newton-cg", tol=1e-9, max_iter=1000
    )
    return model.fit(x, labels.numpy())


def objective(x, labels, w, b, c: float) -> float:
    """Σ CE + ‖W‖²/(2C) in numpy."""
    logits = x.double().numpy() @ w.T + b
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(x)), labels.numpy()].sum() + (w**2).sum() / (2 * c)


@pytest.mark.parametrize("c", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_bias_predictions_and_objective_are_scikit_learns(shape, c):
    x, labels = samples(*shape)
    theirs = scikit(x, labels, c)
    w, b = (t.numpy() for t in logistic_regression(x, labels, shape[2], c))
    np.testing.assert_allclose(w, theirs.coef_, atol=1e-4 * abs(theirs.coef_).max())
    centred = theirs.intercept_ - theirs.intercept_.mean()  # a shift of all changes nothing
    np.testing.assert_allclose(b - b.mean(), centred, atol=1e-3 * max(1, abs(centred).max()))
    new, _ = samples(200, *shape[1:], seed=1)
    ours = (new.double().numpy() @ w.T + b).argmax(axis=1)
    assert (ours == theirs.predict(new.double().numpy())).mean() > 0.99
    values = [
        objective(x, labels, *pair, c) for pair in ((w, b), (theirs.coef_, theirs.intercept_))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-8)
    assert values[0] < objective(x, labels, 0 * w, 0 * b, c)


@pytest.mark.parametrize("c", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_rough_solution_predicts_as_scikit_learns_does(shape, c):
    x, labels = samples(*shape)
    w, b = logistic_regression(x, labels, shape[2], c, rough=True)
    assert w.dtype == b.dtype == torch.float64
    new, _ = samples(200, *shape[1:], seed=1)
    predicted = scikit(x, labels, c).predict(new.double().numpy())
    assert ((new.double() @ w.T + b).argmax(dim=1).numpy() == predicted).mean() > 0.99


def test_c_is_searched_roughly_and_what_is_kept_is_exact(new_clip, pictures, monkeypatch):
    asked = []
    real = linear_probe.logistic_regression

    def solve(*arguments):
        asked.append(arguments[5])
        return real(*arguments)

    monkeypatch.setattr(linear_probe, "logistic_regression", solve)
    train, val = samples(60, 32, 3), samples(30, 32, 3, seed=1)
    probe(new_clip(), 3).fit(pictures(*train), pictures(*val), descend=None)
    assert asked[:7] == [False] * 3 + [True] * 4  # of the sweep, C over 10^-2
    assert len(asked) == 24
    assert not asked[-1]


def test_a_far_middle_of_all_features_moves_b_alone():
    """CLIP's features share most of their length. W stays, and b takes the shift up: -W·shift."""
    x, labels = samples(*SHAPES[0])
    w, b = logistic_regression(x, labels, 3, 1.0)
    shift = 100.0
    far_w, far_b = logistic_regression(x.double() + shift, labels, 3, 1.0)
    torch.testing.assert_close(far_w, w, atol=1e-6, rtol=0)
    torch.testing.assert_close(far_b, b - shift * w.sum(dim=1), atol=1e-4, rtol=0)


def test_two_classes_are_scikit_learns_single_row():
    """It keeps w₁ - w₀ alone, whose square is twice that of both rows: half the penalty."""
    x, labels = samples(50, 6, 2)
    w, b = logistic_regression(x, labels, 2, 0.5)
    theirs = scikit(x, labels, 1.0)
    np.testing.assert_allclose(w[1] - w[0], theirs.coef_[0], atol=1e-5)
    assert (b[1] - b[0]).item() == pytest.approx(theirs.intercept_[0], abs=1e-5)


@pytest.mark.parametrize("c", [1e-6, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_gradient_vanishes_at_the_solution(shape, c):
    x, labels = samples(*shape)
    w, b = (t.numpy() for t in logistic_regression(x, labels, shape[2], c))
    x = x.double().numpy()
    p = np.exp(x @ w.T + b)
    p /= p.sum(axis=1, keepdims=True)
    miss = p - np.eye(shape[2])[labels.numpy()]  # (N, K)
    assert abs(miss.T @ x + w / c).max() < 1e-4 * abs(x).sum()  # of what the terms add up to
    assert abs(miss.T @ x + w / c).max() < 1e-3
    assert abs(miss.sum(axis=0)).max() < 1e-3


def naive_search(train, val) -> float:
    """log10 C: of 10^-6, 10^-4 … 10^6 the best, then eight times one step to either side, halved.

    Always the smallest C of those with the best validation accuracy.
    """
    tried = {}

    def score(log_c: float) -> tuple[float, float]:
        if log_c not in tried:
            model = scikit(*train, 10**log_c)
            tried[log_c] = float((model.predict(val[0].double().numpy()) == val[1].numpy()).mean())
        return tried[log_c]

    best = max(range(-6, 7, 2), key=lambda log_c: (score(log_c), -log_c))
    step = 1.0
    for _ in range(8):
        near = (best - step, best, best + step)
        best = max(near, key=lambda log_c: (score(log_c), -log_c))
        step /= 2
    return best


def probe(clip, classes: int, **settings) -> LinearProbe:
    names = [f"kind {k}" for k in range(classes)]
    return LinearProbe(clip, names, "a {}", LinearProbeSettings(**settings))


@pytest.mark.parametrize("seed", [1, 2])
def test_c_is_the_one_a_naive_search_on_validation_finds(seed, new_clip, pictures, capsys):
    train, val = samples(90, 32, 3, noise=4.0), samples(60, 32, 3, seed=seed, noise=4.0)
    method = probe(new_clip(), 3)
    method.fit(pictures(*train), pictures(*val), descend=None)
    best = naive_search(train, val)
    said = capsys.readouterr().out
    assert f"C = {10**best:.4g}: " in said
    theirs = scikit(*train, 10**best)
    np.testing.assert_allclose(
        method.head.weight.detach().numpy(),
        theirs.coef_,
        atol=1e-3 * abs(theirs.coef_).max(),
    )
    right = 100 * theirs.score(val[0].double().numpy(), val[1].numpy())
    assert said.rstrip().endswith(f"{right:.2f} % on validation")
    with torch.no_grad():
        agree = method.classify(val[0]).argmax(dim=1).numpy() == theirs.predict(
            val[0].double().numpy()
        )
    assert agree.all()


def test_of_equally_good_c_the_smallest_is_taken(new_clip, pictures, capsys):
    """Classes far apart: every C is right about all, so each of the eight steps goes down."""
    train, val = samples(30, 32, 3, noise=0.01), samples(9, 32, 3, seed=1, noise=0.01)
    probe(new_clip(), 3).fit(pictures(*train), pictures(*val), descend=None)
    smallest = -6 - sum(2.0**-i for i in range(8))
    assert f"C = {10**smallest:.4g}: 100.00 %" in capsys.readouterr().out


def test_a_given_c_is_used_and_validation_is_not_read(new_clip, pictures):
    x, labels = samples(60, 32, 3)
    method = probe(new_clip(), 3, c=0.3)
    nothing = pictures(torch.full((4, 32), torch.nan), torch.zeros(4, dtype=torch.int64))
    method.fit(pictures(x, labels), nothing, descend=None)
    theirs = scikit(x, labels, 0.3)
    np.testing.assert_allclose(method.head.weight.detach().numpy(), theirs.coef_, atol=1e-4)


@pytest.mark.parametrize("balance", [False, True])
def test_balanced_classes_are_scikit_learns(balance, new_clip, pictures):
    """Classes of 20, 5 and 2 images."""
    x, labels = samples(60, 32, 3)
    chosen = torch.cat([(labels == k).nonzero().flatten()[:n] for k, n in enumerate((20, 5, 2))])
    train = pictures(x[chosen], labels[chosen])
    train.real = lambda: train
    train.class_weights = partial(Batches.class_weights, train)
    method = probe(new_clip(), 3, c=0.3, balance=balance)
    method.fit(train, train, descend=None)
    plain, weighted = (scikit(x[chosen], labels[chosen], 0.3, b).coef_ for b in (None, "balanced"))
    expected = weighted if balance else plain
    np.testing.assert_allclose(method.head.weight.detach().numpy(), expected, atol=1e-4)
    assert abs(weighted - plain).max() > 1e-2
