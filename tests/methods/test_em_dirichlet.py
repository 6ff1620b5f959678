"""EM-Dirichlet: its steps against scipy, its likelihood, and mixtures that were planted."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import digamma, gammaln
from scipy.stats import dirichlet

from clip_min import CLIP, CLIPConfig, UserError
from methods import em_dirichlet
from methods.em_dirichlet import (
    EMDirichlet,
    EMDirichletSettings,
    fit_dirichlets,
    log_dirichlet,
    mm_step,
)

TEMPLATE = "a photo of a {}."


def points(alpha, n: int, seed: int = 0) -> np.ndarray:
    """log z (n, D) of points drawn from Dir(alpha)."""
    return np.log(np.random.default_rng(seed).dirichlet(alpha, n).clip(1e-300))


def likelihood(alpha: np.ndarray, means: np.ndarray) -> float:
    """Of one point whose log z are `means` (or the mean of many)."""
    return gammaln(alpha.sum()) - gammaln(alpha).sum() + ((alpha - 1) * means).sum()


def posterior(log_joint: np.ndarray) -> np.ndarray:
    p = np.exp(log_joint - log_joint.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def curvature(a: float) -> float:
    """The least c for which the parabola at a is above φ(0) = 0 (its limit, for small a)."""
    if a <= 1e-3:
        return np.pi**2 / 6
    return 2 * (a * digamma(a + 1) - gammaln(a + 1)) / a**2


# ---------------------------------------------------------------------- one Dirichlet, fitted


@pytest.mark.parametrize("dims", [2, 3, 10, 102])
def test_a_step_never_lowers_the_likelihood(dims):
    rng = np.random.default_rng(dims)
    for size in np.repeat(10.0 ** np.arange(-5, 6), 6):
        alpha = size * rng.uniform(0.2, 5, dims) * 10 ** rng.uniform(-2, 2, dims)
        means = points(10 ** rng.uniform(-1, 2, dims), 5, rng.integers(99)).mean(axis=0)
        after = mm_step(torch.tensor(alpha), torch.tensor(means)).numpy()
        assert (after > 0).all()
        assert np.isfinite(after).all()
        before = likelihood(alpha, means)
        rounding = 1e-12 * (abs(gammaln(alpha)).sum() + gammaln(alpha.sum()) + 1)
        assert likelihood(after, means) >= before - rounding, (size, alpha)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.0011, 0.1, 1.0, 30.0, 1e4])
def test_a_step_is_the_maximum_of_its_bound(size):
    """Term by term: ln x + b·x - c/2·(x - α)², found by a search without derivatives."""
    alpha = size * np.array([0.5, 1.0, 2.0])
    means = points([2.0, 1.0, 4.0], 7).mean(axis=0)
    after = mm_step(torch.tensor(alpha), torch.tensor(means)).numpy()
    for x, a, t in zip(after, alpha, means, strict=True):
        phi, slope = gammaln(a + 1), digamma(a + 1)
        c = curvature(a)

        def bound(y, a=a, t=t, c=c, phi=phi, slope=slope):
            rest = np.log(y) - phi - slope * (y - a) - c / 2 * (y - a) ** 2
            return rest + digamma(alpha.sum()) * (y - a) + t * y

        best = minimize_scalar(lambda y: -bound(np.exp(y)), np.log(x) + np.array([-1.0, 1.0]))
        assert np.exp(best.x) == pytest.approx(x, rel=1e-4)


@pytest.mark.parametrize("alpha", 10.0 ** np.arange(-6, 5))
def test_the_parabola_is_above_phi_and_touches_it(alpha):
    """φ(x) = ln Γ(x + 1), for all x >= 0; c is read off the step, not computed again."""
    means = np.array([0.0 if alpha < 1 else -1.0, -1.0])  # so that the step is a large one
    after = mm_step(torch.tensor([alpha, 3.0]), torch.tensor(means))[0].item()
    slope = digamma(alpha + 1)
    # 1/x + b - c(x - α) = 0 at the step's end x, with b = t + ψ(Σα) - φ'(α).
    b = means[0] + digamma(alpha + 3) - slope
    c = (1 / after + b) / (after - alpha)
    assert abs(after / alpha - 1) > 0.01
    x = np.concatenate([[0.0], np.logspace(-8, 6, 300), alpha * np.linspace(0.5, 2, 301)])
    above = gammaln(alpha + 1) + slope * (x - alpha) + c / 2 * (x - alpha) ** 2 - gammaln(x + 1)
    assert above.min() >= -1e-7 * (1 + gammaln(alpha + 1) + alpha * abs(slope))
    assert 0 < c <= np.pi**2 / 6 * (1 + 1e-6)  # φ''(0), and flatter for large α
    assert c == pytest.approx(curvature(alpha), rel=1e-4)


@pytest.mark.parametrize("planted", [[3.0, 1.0, 0.4], [20.0, 30.0, 5.0, 9.0], [0.2, 0.2]])
def test_the_fixed_point_solves_the_digamma_equation_and_is_the_maximum(planted):
    log_z = points(planted, 40)
    means = log_z.mean(axis=0)
    alpha = torch.ones(1, len(planted), dtype=torch.float64)
    alpha = fit_dirichlets(alpha, torch.tensor(log_z), torch.ones(40, 1).double(), 4000)
    alpha = alpha[0].numpy()
    np.testing.assert_allclose(digamma(alpha) - digamma(alpha.sum()), means, atol=1e-6)
    direct = minimize(
        lambda a: -dirichlet.logpdf(np.exp(log_z).T, np.exp(a)).sum(),
        0 * means,
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 5000},
    )
    np.testing.assert_allclose(alpha, np.exp(direct.x), rtol=1e-3)
    again = mm_step(torch.tensor(alpha), torch.tensor(means)).numpy()
    np.testing.assert_allclose(again, alpha, rtol=1e-6)


def test_planted_parameters_are_recovered_from_samples_of_each_class():
    planted = np.array([[5.0, 2.0, 1.0, 3.0], [0.5, 4.0, 0.8, 1.5], [30.0, 10.0, 20.0, 40.0]])
    log_z = np.concatenate([points(alpha, 4000, seed) for seed, alpha in enumerate(planted)])
    u = np.repeat(np.eye(4)[:3], 4000, axis=0)  # a fourth class without any weight
    start = torch.full((4, 4), 1.7, dtype=torch.float64)
    alpha = fit_dirichlets(start, torch.tensor(log_z), torch.tensor(u), 1000)
    np.testing.assert_allclose(alpha[:3].numpy(), planted, rtol=0.06)
    assert torch.equal(alpha[3], start[3])
    assert (start == 1.7).all()  # not changed in place


def test_each_step_raises_the_weighted_likelihood_of_every_class():
    rng = np.random.default_rng(0)
    log_z = points(rng.uniform(0.3, 6, 5), 30)
    u = rng.dirichlet(np.ones(4), 30)
    alpha = torch.ones(4, 5, dtype=torch.float64)
    last = np.full(4, -np.inf)
    for _ in range(20):
        dens = np.stack([dirichlet.logpdf(np.exp(log_z).T, a.numpy()) for a in alpha], axis=1)
        weighted = (u * dens).sum(axis=0)  # (K,)
        assert (weighted >= last - 1e-9).all()
        last = weighted
        alpha = fit_dirichlets(alpha, torch.tensor(log_z), torch.tensor(u), 1)
    assert (last > 0).all()


@pytest.mark.parametrize("tolerance", [0.0, 1e-13, 1e-11, 1e-6, 1e6])
def test_the_steps_end_after_a_small_one_of_those_that_are_asked(tolerance):
    rng = np.random.default_rng(0)
    log_z, u = points(rng.uniform(0.3, 6, 5), 30), rng.dirichlet(np.ones(3), 30)
    means = torch.tensor(u.T @ log_z / u.sum(axis=0)[:, None])
    alpha, taken = np.ones((3, 5)), 0
    while taken < 200:  # as published: a criterion that is asked after steps 51, 101 …
        after = mm_step(torch.tensor(alpha), means).numpy()
        moved = np.linalg.norm(after - alpha) ** 2 / np.linalg.norm(alpha) ** 2
        alpha, taken = after, taken + 1
        if taken in (51, 101, 151) and moved < tolerance:
            break
    start = torch.ones(3, 5, dtype=torch.float64)
    found = fit_dirichlets(start, torch.tensor(log_z), torch.tensor(u), 200, tolerance)
    np.testing.assert_allclose(found.numpy(), alpha, rtol=1e-9)
    assert taken == {0.0: 200, 1e6: 51}.get(tolerance, taken)


def test_log_density_is_scipys():
    rng = np.random.default_rng(0)
    alpha, log_z = rng.uniform(0.1, 40, (3, 6)), points(np.ones(6), 8)
    expected = [dirichlet.logpdf(np.exp(log_z).T, a) for a in alpha]
    found = log_dirichlet(torch.tensor(log_z), torch.tensor(alpha))
    np.testing.assert_allclose(found.numpy(), np.stack(expected, axis=1), rtol=1e-9)


# -------------------------------------------------------------------------------- the whole method


TEXT = torch.eye(4, dtype=torch.float64)  # class features: the cosine with class k is number k
NAMES = ["rose", "tulip", "daisy", "dahlia"]
PLANTED = np.array([[12, 10, 2, 2], [4, 18, 6, 2], [2, 6, 16, 13], [2, 2, 4, 12]], float)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIP(CLIPConfig(4, 32, 32, 64, 1, 1, 64, 1, 1))


@pytest.fixture
def em(clip, monkeypatch):
    """(**settings) -> an EMDirichlet of the four classes, whose text features are TEXT."""
    monkeypatch.setattr(EMDirichlet, "class_features", lambda self: TEXT[places(self.classnames)])

    def make(**settings) -> EMDirichlet:
        settings = EMDirichletSettings(**{"temperature": 30.0, **settings})
        return EMDirichlet(clip, NAMES, TEMPLATE, settings)

    return make


def places(names) -> list[int]:
    return [NAMES.index(name) for name in names]


def features_of(log_z: np.ndarray, temperature: float = 30.0) -> torch.Tensor:
    """Unit features (N, 4) with softmax(T · feature) = z: a shift of all logits sets the norm."""
    x = log_z - log_z.mean(axis=1, keepdims=True)
    shift = np.sqrt((temperature**2 - (x**2).sum(axis=1, keepdims=True)) / x.shape[1])
    return torch.tensor((x + shift) / temperature)


def planted_mixture(counts=(50, 30, 40)) -> tuple[np.ndarray, np.ndarray]:
    """log z (N, 4) of images of the first classes, that many of each, and their labels."""
    parts = [points(PLANTED[k], count, seed=k) for k, count in enumerate(counts)]
    return np.concatenate(parts), np.repeat(range(len(counts)), counts)


@pytest.fixture
def rounds(monkeypatch) -> list:
    """What every call of `fit_dirichlets` was given and gave: (points, u, alpha after it)."""
    seen, real = [], em_dirichlet.fit_dirichlets

    def fit(alpha, log_z, u, *limits):
        after = real(alpha, log_z, u, *limits)
        seen.append((log_z.numpy(), u.numpy(), after.numpy()))
        return after

    monkeypatch.setattr(em_dirichlet, "fit_dirichlets", fit)
    return seen


def naive(log_z, settings, support=None, labels=()) -> np.ndarray:
    """The three steps of the method in numpy, with densities by scipy -> logits (Q, 4)."""
    z, classes = np.exp(log_z), log_z.shape[1]
    every = log_z if support is None else np.concatenate([log_z, support])
    u, alpha = z, np.ones((classes, classes))
    for _ in range(settings.iterations):
        weights = np.concatenate([u, np.eye(classes)[list(labels)]])
        for k in np.flatnonzero(weights.sum(axis=0) > 1e-15):  # an empty class stays as it is
            means = (weights[:, k, None] * every).sum(axis=0) / weights[:, k].sum()
            for _ in range(settings.mm_steps):
                a = alpha[k]
                c = np.array([curvature(x) for x in a])
                b = means + digamma(a.sum()) - digamma(a + 1) + c * a
                alpha[k] = (b + np.sqrt(b * b + 4 * c)) / (2 * c)
        density = np.stack([dirichlet.logpdf(z.T, a) for a in alpha], axis=1)
        balance = settings.balance if settings.balance >= 0 else classes // 5
        logits = density + balance * np.log(u.mean(axis=0) + 1e-15)
        u = posterior(logits)
        if settings.assignment == "hard":
            u = np.eye(classes)[u.argmax(axis=1)]
    return logits


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("balance", [0.0, 1.0, 4.0])
def test_logits_are_those_of_the_three_steps_by_hand(balance, assignment, support, em, pictures):
    log_z = planted_mixture()[0][::4]
    method = em(
        balance=balance,
        assignment=assignment,
        iterations=2 if assignment == "hard" else 5,
        mm_steps=3,
        use_support=support,
    )
    kept = points([2.0, 1.0, 3.0, 5.0], 8, seed=9)
    labels = [3, 0, 0, 1, 2, 3, 2, 1]
    method.fit(pictures(features_of(kept), labels), None, None)
    given = (kept, labels) if support else ()
    found = method.classify(features_of(log_z)).numpy()
    expected = naive(log_z, method.settings, *given)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_with_lambda_1_and_soft_assignments_the_mixtures_likelihood_never_falls(em, rounds):
    log_z, _ = planted_mixture()
    em(balance=1.0, iterations=30, mm_steps=2).classify(features_of(log_z))
    (first, _, _), observed = rounds[0], []
    np.testing.assert_allclose(first, log_z, atol=1e-5)
    for _, u, alpha in rounds:
        joint = [dirichlet.logpdf(np.exp(log_z).T, a) for a in alpha] + np.log(u.mean(axis=0))[
            :, None
        ]
        peak = joint.max(axis=0)
        observed.append((np.log(np.exp(joint - peak).sum(axis=0)) + peak).sum())
    assert (np.diff(observed) >= -1e-6).all()
    assert observed[-1] > observed[0] + 10


def test_a_planted_mixture_is_recovered(em, rounds):
    counts = np.array([400, 200, 300, 250])
    log_z, labels = planted_mixture(counts)
    logits = em(balance=1.0, iterations=50).classify(features_of(log_z))
    right = (logits.argmax(dim=1).numpy() == labels).mean()
    alone = (log_z.argmax(axis=1) == labels).mean()
    known = np.stack([dirichlet.logpdf(np.exp(log_z).T, a) for a in PLANTED], axis=1)
    best = ((known + np.log(counts)).argmax(axis=1) == labels).mean()
    assert right > alone + 0.1
    assert right > best - 0.02  # nearly as one who knows the mixture would name them
    _, u, alpha = rounds[-1]
    np.testing.assert_allclose(u.mean(axis=0), counts / counts.sum(), atol=0.03)
    np.testing.assert_allclose(alpha, PLANTED, rtol=0.2)


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_hard_assignments_are_one_hot_and_soft_ones_are_not(assignment, em, rounds):
    log_z, _ = planted_mixture()
    em(assignment=assignment, balance=1.0).classify(features_of(log_z))
    assert len(rounds) == 10
    for _, u, _ in rounds[1:]:
        np.testing.assert_allclose(u.sum(axis=1), 1)
        assert (set(np.unique(u)) == {0.0, 1.0}) == (assignment == "hard")
    np.testing.assert_allclose(rounds[0][1], np.exp(log_z), atol=1e-5)  # both start at z


def test_support_images_join_with_their_labels(em, rounds, pictures):
    method = em(use_support=True, iterations=4)
    kept = points([2.0, 1.0, 3.0, 5.0], 6, seed=9)
    method.fit(pictures(features_of(kept), [3, 0, 0, 1, 2, 3]), None, None)
    method.classify(features_of(planted_mixture()[0]))
    for every, u, _ in rounds:
        np.testing.assert_allclose(every[120:], kept, atol=1e-5)
        np.testing.assert_array_equal(u[120:], np.eye(4)[[3, 0, 0, 1, 2, 3]])  # in every round


def test_support_images_stay_out_unless_asked_for(em, pictures):
    method, kept = em(), points([2.0, 1.0, 3.0, 5.0], 6, seed=9)
    method.fit(pictures(features_of(kept), [3, 0, 0, 1, 2, 3]), None, None)
    x = features_of(planted_mixture()[0])
    assert torch.equal(method.classify(x), em().classify(x))
    assert len(method.support) == 0


def test_support_of_classes_not_asked_for_is_ignored(em, pictures):
    x = features_of(planted_mixture()[0])
    kept, labels = (
        features_of(points([2.0, 1.0, 3.0, 5.0], 6, seed=9)),
        torch.tensor([3, 0, 0, 1, 2, 3]),
    )
    every, few = em(use_support=True), em(use_support=True)
    every.fit(pictures(kept, labels), None, None)
    mine = (labels == 0) | (labels == 2)
    few.fit(pictures(kept[mine], labels[mine]), None, None)
    asked = ["daisy", "rose"]
    assert torch.equal(every.for_classes(asked).classify(x), few.for_classes(asked).classify(x))
    foreign = every.for_classes(["tulip"])
    assert foreign.votes().sum() == 1
    none = em(use_support=True)
    none.fit(pictures(kept[labels == 3], labels[labels == 3]), None, None)
    expected = em().for_classes(asked).classify(x)
    torch.testing.assert_close(none.for_classes(asked).classify(x), expected)


def test_the_order_of_images_does_not_matter_but_their_company_does(em):
    x = features_of(planted_mixture()[0])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    logits = em().classify(x)
    torch.testing.assert_close(em().classify(x[order]), logits[order])
    assert not torch.allclose(em().classify(x[:60]), logits[:60], atol=0.1)


def test_a_larger_lambda_gives_fewer_classes(em):
    x = features_of(planted_mixture()[0])
    counts = [em(balance=b).classify(x).argmax(dim=1).unique().numel() for b in (0.0, 1.0, 100.0)]
    assert counts[0] == 4
    assert counts[0] >= counts[1] >= counts[2]
    assert counts[2] < 4


def test_below_0_lambda_is_a_fifth_of_the_classes_rounded_down(clip, images):
    names = [f"flower {k}" for k in range(13)]
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    logits = [
        EMDirichlet(clip, names, TEMPLATE, EMDirichletSettings(balance=balance)).classify(x)
        for balance in (-1.0, 2.0, 3.0)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_the_paper_recipes_are_those_of_its_code():
    """src/methods/em_dirichlet.py, config/, src/sampler_zero_shot.py of its repository."""
    for name, support in (("paper", False), ("paper-few-shot", True)):
        s = EMDirichletSettings(**EMDirichlet.recipes[name])
        assert (s.temperature, s.queries, s.assignment) == (30, 75, "soft")
        assert (s.iterations, s.mm_steps, s.mm_tolerance) == (20, 1000, 1e-11)
        assert (s.balance, s.use_support) == (-1, support)
        assert (s.k_eff, s.k_eff_max) == ((5, 0) if support else (3, 10))


def test_a_range_of_k_eff_the_wrong_way_round_is_an_error():
    with pytest.raises(UserError, match="--k-eff-max 3: expected 0, or --k-eff 5 or more"):
        EMDirichletSettings(k_eff_max=3)


def test_one_image_alone_is_labelled(em):
    logits = em().classify(features_of(points(PLANTED[0], 1)))
    assert logits.shape == (1, 4)
    assert logits.isfinite().all()
