"""LP++ beside a second writing of it in numpy, and beside autograd's slopes and curvatures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from methods import lp_plus_plus
from methods.lp_plus_plus import LPPlusPlus, LPPlusPlusSettings, step_sizes
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy", "dahlia"]
TEMPLATE = "a photo of a {}."


def new(clip, **settings) -> LPPlusPlus:
    return LPPlusPlus(clip, NAMES, TEMPLATE, LPPlusPlusSettings(**settings))


def draw(count: int, seed: int, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clouds: features (N, 32), not normalised, and labels (N,)."""
    middles = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=rng)
    return middles[labels] + noise * torch.randn(count, 32, generator=rng), labels


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_loops(f, w, alpha, t) -> np.ndarray:
    """logit_k = f·(w_k + α_k·t_k), an image and a class at a time."""
    return np.array([[x @ (w[k] + alpha[k] * t[k]) for k in range(len(w))] for x in f])


def shares(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return -np.log(shares(logits)[np.arange(len(labels)), labels]).mean()


def shaken(method: LPPlusPlus, seed: int, size: float = 3.0) -> LPPlusPlus:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        method.w += size * torch.randn(method.w.shape, generator=rng)
        method.alpha += size * torch.randn(method.alpha.shape, generator=rng)
    return method


def test_logits_are_products_with_prototype_and_name(new_clip):
    method, (x, _) = shaken(new(new_clip()), 1), draw(7, 2)
    expected = by_loops(
        unit(numbers(x)),
        numbers(method.w),
        numbers(method.alpha),
        unit(numbers(method.class_features())),
    )
    np.testing.assert_allclose(numbers(method.classify(x)), expected, atol=1e-4)
    np.testing.assert_allclose(numbers(method.classify(9 * x)), expected, atol=1e-4)
    np.testing.assert_allclose(
        numbers(F.normalize(x, dim=-1) @ method.rows().T), expected, atol=1e-4
    )


def test_before_it_learns_it_is_zero_shot(new_clip, images):
    clip = new_clip()
    method, zero_shot = new(clip), ZeroShot.plain(clip, NAMES, TEMPLATE)
    torch.testing.assert_close(method(images), zero_shot(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("room", [4 * 3, 2**24])  # three images at once, or all
def test_gradients_in_closed_form_are_autograds(room, new_clip, monkeypatch):
    monkeypatch.setattr(lp_plus_plus, "ROOM", room)
    method, (x, labels) = shaken(new(new_clip()), 1), draw(23, 2)
    loss = method.loss(x, labels)
    loss.backward()
    f = F.normalize(x, dim=-1)
    torch.testing.assert_close(method.gradient(f, labels), method.w.grad)
    torch.testing.assert_close(method.blend_gradient(f, labels), method.alpha.grad)
    logits = numbers(method.classify(x))
    assert loss.item() == pytest.approx(cross_entropy(logits, labels.numpy()), rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_loss_bends_no_more_than_the_steps_take_for_granted(seed, new_clip):
    """All second derivatives, of a class alone and of all, at points of small and large logits."""
    method, (x, labels) = new(new_clip()), draw(30, seed)
    f, t = F.normalize(x, dim=-1).double(), method.names.double()
    eta_w, eta_alpha = step_sizes(f.float(), t.float())
    largest = []
    for size in (0.0, 1.0, 20.0):
        rng = torch.Generator().manual_seed(seed)
        w = size * torch.randn(t.shape, generator=rng).double()
        alpha = size * torch.randn(4, generator=rng).double()

        def of_w(w, alpha=alpha):
            return F.cross_entropy(f @ (w + alpha[:, None] * t).T, labels)

        def of_alpha(alpha, w=w):
            return F.cross_entropy(f @ (w + alpha[:, None] * t).T, labels)

        bends = torch.autograd.functional.hessian(of_w, w)  # (K, E, K, E)
        alone = [torch.linalg.eigvalsh(bends[k, :, k])[-1] for k in range(4)]
        every = torch.linalg.eigvalsh(bends.reshape(bends.shape[0] * bends.shape[1], -1))[-1]
        assert max(alone) <= 1 / eta_w * (1 + 1e-6)
        assert every <= 2 / eta_w * (1 + 1e-6)
        bends = torch.autograd.functional.hessian(of_alpha, alpha)  # (K, K)
        assert bends.diagonal().max() <= 1 / eta_alpha * (1 + 1e-6)
        assert torch.linalg.eigvalsh(bends)[-1] <= 2 / eta_alpha * (1 + 1e-6)
        largest.append(max(alone) * eta_w)
    assert max(largest) > 0.3  # and not by far: the steps are not timid


def test_of_two_classes_with_even_odds_the_steps_are_exact():
    """One image, f·t = ±1: p(1 - p) is 1/4, and the bend of one class 1/4 along f."""
    f = torch.tensor([[0.6, 0.8]])
    assert step_sizes(f, torch.stack([f[0], -f[0]])) == pytest.approx((4.0, 4.0))
    half = torch.tensor([[0.8, -0.6]])
    assert step_sizes(torch.cat([f, half]), f) == pytest.approx((8.0, 8.0))


@pytest.mark.parametrize("start", ["fitted", "published"])
def test_no_step_raises_the_loss(start, new_clip, pictures, monkeypatch):
    method, (x, labels) = new(new_clip(), start=start, steps=60), draw(40, 5)
    losses, gradient = [], method.gradient

    def watched(f, right):
        losses.append(cross_entropy(numbers(method.classify(f)), right.numpy()))
        return gradient(f, right)

    train = pictures(x, labels)
    method.begin(F.normalize(x, dim=-1), labels)
    monkeypatch.setattr(method, "begin", lambda *_: None)
    monkeypatch.setattr(method, "gradient", watched)
    method.fit(train, pictures(*draw(9, 6)), descend=None)
    assert len(losses) == 60 + 60 // 10  # with one step on α after every ten on w
    assert all(later <= before + 1e-6 for before, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.9 * losses[0]


def second_writing(x, labels, val, t, scale: float, start: str, steps: int):
    """The whole of it in numpy: w, α and the step that is kept."""
    f, labels, classes = unit(numbers(x)), labels.numpy(), len(t)
    w = np.stack([f[labels == k].mean(axis=0) for k in range(classes)])
    cosines = [x @ t[k] for x, k in zip(f, labels, strict=True)]
    first = 250 * np.mean(cosines)
    if start == "fitted":
        first = minimize_scalar(
            lambda a: cross_entropy(by_loops(f, w, a * np.ones(classes), t), labels),
            bounds=(0, scale),
            method="bounded",
            options={"xatol": 1e-9},
        ).x
    alpha = first * np.ones(classes)
    eta_w = 4 * len(f) / np.linalg.norm(f, ord=2) ** 2  # the largest singular value's square
    eta_alpha = 4 * len(f) / max(sum((x @ t[k]) ** 2 for x in f) for k in range(classes))
    y, best = np.eye(classes)[labels], None
    for step in range(1, steps + 1):
        miss = shares(by_loops(f, w, alpha, t)) - y
        w = w - eta_w * np.einsum("nk,ne->ke", miss, f) / len(f)
        if step % 10 == 0:
            miss = shares(by_loops(f, w, alpha, t)) - y
            slope = [np.mean(miss[:, k] * (f @ t[k])) for k in range(classes)]
            alpha = alpha - eta_alpha * np.array(slope)
        if step % 10 == 0 or step == steps:
            named = by_loops(unit(numbers(val[0])), w, alpha, t).argmax(axis=1)
            right = (named == val[1].numpy()).mean()
            if best is None or right >= best[0]:
                best = right, step, w, alpha
    return best


@pytest.mark.parametrize("start", ["fitted", "published"])
@pytest.mark.parametrize(("seed", "steps"), [(1, 45), (2, 120), (7, 3)])
def test_fit_is_the_second_writings(seed, steps, start, new_clip, pictures, capsys):
    method, val = new(new_clip(), start=start, steps=steps), draw(50, seed + 20)
    x, labels = draw(24, seed)
    method.fit(pictures(x, labels), pictures(*val), descend=None)
    t, scale = unit(numbers(method.class_features())), method.clip.logit_scale.exp().item()
    right, step, w, alpha = second_writing(x, labels, val, t, scale, start, steps)
    assert f"step {step} of {steps}: {100 * right:.2f} % on" in capsys.readouterr().out
    np.testing.assert_allclose(numbers(method.w), w, atol=2e-3)
    np.testing.assert_allclose(numbers(method.alpha), alpha, atol=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_alpha_stays_between_none_and_zero_shots(sign, new_clip):
    """Where every image lies on its class's name, or opposite to it."""
    method, labels = new(new_clip()), torch.arange(4)
    method.begin(sign * method.names[labels], labels)
    s = method.clip.logit_scale.exp().item()
    expected = s if sign > 0 else 0.0
    assert method.alpha.tolist() == pytest.approx([expected] * 4, abs=1e-4)


def test_with_many_steps_it_is_logistic_regression_without_a_bias(new_clip, pictures):
    """The names do not change what can be reached, only the way there."""
    x, labels = draw(200, 3, noise=6.0)
    method = new(new_clip(), steps=20_000)
    nothing = pictures(torch.zeros(1, 32), [0])  # always right: the last step is kept
    method.fit(pictures(x, labels), nothing, descend=None)
    f = unit(numbers(x))
    theirs = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=10_000)
    theirs.fit(f, labels.numpy())
    least = cross_entropy(f @ theirs.coef_.T, labels.numpy())
    found = cross_entropy(numbers(method.classify(x)), labels.numpy())
    assert least <= found + 1e-6
    assert found == pytest.approx(least, rel=1e-3)


def test_a_class_without_images_is_named_by_its_name_and_gets_less(new_clip, pictures):
    method, x = new(new_clip(), steps=30), draw(12, 4)[0]
    labels = torch.arange(12) % 3  # none of the last
    method.begin(F.normalize(x, dim=-1), labels)
    assert not method.w[3].any()
    method.fit(pictures(x, labels), pictures(x, labels), descend=None)
    assert all(p.isfinite().all() for p in method.parameters())
    assert (method.classify(x).argmax(dim=1) == labels).double().mean() > 0.9
