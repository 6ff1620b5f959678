"""TransCLIP beside a naive N x K x E writing in numpy, sklearn's Gaussians, and its limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_min import CLIP, CLIPConfig, PromptTree, tokenize
from fewshot.transductive import Queries
from methods import transclip
from methods.transclip import (
    GAMMAS,
    TransCLIP,
    TransCLIPSettings,
    first_means,
    log_densities,
    moments,
    nearest,
)

E, NAMES = 6, ["rose", "tulip", "daisy", "dahlia"]
TEXT = F.normalize(torch.randn(4, E, generator=torch.Generator().manual_seed(2)), dim=-1)


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(E, 32, 32, 64, 1, 1, 64, 1, 1)).eval()


@pytest.fixture
def new(clip, monkeypatch):
    """(**settings) -> a TransCLIP of the four classes, whose text features are TEXT."""
    rows = dict(zip(NAMES, TEXT, strict=True))
    features = property(lambda self: torch.stack([rows[n] for n in self.classnames]))
    monkeypatch.setattr(TransCLIP, "class_features", lambda self: features.fget(self))

    def make(names=NAMES, **settings) -> TransCLIP:
        return TransCLIP(clip, names, "{}", TransCLIPSettings(**settings))

    return make


def clouds(n: int = 40, spread: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Image features (n, E), not normalised, and labels: clouds beside the names."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    middles = TEXT + 0.4 * torch.randn(4, E, generator=torch.Generator().manual_seed(9))
    return middles[labels] + spread * torch.randn(n, E, generator=rng), labels


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def naive(method: TransCLIP, features: torch.Tensor, support=None, labels=()) -> np.ndarray:
    """One whole run with full N x N and N x K x E arrays -> z (N, K)."""
    s, text = method.settings, TEXT.numpy().astype(float)
    query = unit(features.numpy().astype(float))
    n, k = len(query), len(text)
    x, votes = query, np.zeros((0, k))
    if support is not None:
        x = np.concatenate([query, unit(support.numpy().astype(float))])
        votes = np.eye(k)[list(labels)]
    scale = method.clip.logit_scale.exp().item()
    y = softmax(scale * query @ text.T)
    a = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        cosines = x @ x[i]
        nearest = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosines[j])
        for j in nearest[: s.neighbours]:
            a[i, j] = max(0.0, cosines[j])
    a = (a + a.T) / (2 * max(1, s.neighbours))
    mu = np.zeros((k, E))
    for c in range(k):
        mine = votes[:, c].astype(bool)
        if mine.any():
            mu[c] = x[n:][mine].mean(axis=0)
        else:
            surest = np.argsort(-y[:, c], kind="stable")[: s.confident]
            mu[c] = (y[surest, c, None] * query[surest]).sum(axis=0)
    mu, v = unit(mu), np.full(E, 1 / E)
    z, gamma = y.copy(), method.gamma.item()
    for left in range(s.iterations, -1, -1):
        squares = (query[:, None, :] - mu[None]) ** 2 / v  # (N, K, E)
        density = -0.5 * squares.sum(axis=2) - 0.5 * np.log(2 * np.pi * v).sum()
        for _ in range(s.z_steps):
            pull = (a @ np.concatenate([z, votes]))[:n]
            z = y**s.text_weight * np.exp(density / s.temperature + pull)
            z /= z.sum(axis=1, keepdims=True)
        if left == 0:
            break
        counts = np.concatenate([z / n, gamma * votes / max(1, len(votes))])  # (N + S, K)
        mu = unit(np.einsum("nk,ne->ke", counts, x))
        v = np.einsum("nk,nke->e", counts, (x[:, None, :] - mu[None]) ** 2) / counts.sum()
    return z


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_weight": 0.3, "neighbours": 1, "temperature": 1.0, "confident": 3},
        {"neighbours": 0, "temperature": 5.0, "iterations": 3, "z_steps": 1},
        {"text_weight": 0.0, "neighbours": 5, "iterations": 4, "z_steps": 2},
    ],
)
def test_a_whole_run_is_that_of_the_naive_writing(settings, support, new, pictures):
    x, _ = clouds()
    method = new(**settings, use_support=support, gamma=0.7)
    kept, labels = clouds(9, seed=5)
    kept, labels = kept[labels != 3], labels[labels != 3]  # a class has no training image
    method.fit(pictures(kept, labels), None, None)
    expected = naive(method, x, *((kept, labels.tolist()) if support else ()))
    logits = method.classify(x)
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), expected, atol=2e-5)
    names = softmax(
        method.clip.logit_scale.exp().item() * (F.normalize(x, dim=-1) @ TEXT.T).numpy()
    )
    assert abs(expected - names).max() > 0.1  # else nothing was tried


def test_densities_are_those_of_sklearns_gaussians():
    """With equal proportions and one diagonal for all, its posterior is the softmax of ours."""
    rng = np.random.default_rng(0)
    x, means, v = rng.normal(size=(30, E)), rng.normal(size=(4, E)), rng.uniform(0.2, 3, E)
    mixture = GaussianMixture(4, covariance_type="diag")
    mixture.weights_, mixture.means_ = np.full(4, 0.25), means
    mixture.covariances_ = np.tile(v, (4, 1))
    mixture.precisions_cholesky_ = 1 / np.sqrt(mixture.covariances_)
    found = log_densities(*map(torch.tensor, (x, means, v))).softmax(dim=1)
    np.testing.assert_allclose(found.numpy(), mixture.predict_proba(x), atol=1e-12)


def test_moments_are_the_weighted_ones_that_sklearn_pools():
    """Hard weights: sklearn's within-class variances, pooled, if the means were not on the sphere;
    there they are the squares about the mean's direction."""
    rng = np.random.default_rng(1)
    x, labels = unit(rng.normal(size=(50, E))), np.arange(50) % 3
    means, v = moments(torch.tensor(x), torch.eye(3)[labels].double(), torch.zeros(3, E).double())
    centres = np.stack([x[labels == k].mean(axis=0) for k in range(3)])
    np.testing.assert_allclose(means.numpy(), unit(centres), atol=1e-12)
    np.testing.assert_allclose(v.numpy(), ((x - unit(centres)[labels]) ** 2).mean(axis=0))
    kept = torch.ones(3, E).double()
    means, _ = moments(torch.tensor(x), torch.eye(3)[labels * 0].double(), kept)
    assert torch.equal(means[1:], kept[1:])  # classes without weight


def test_each_block_lowers_the_objective(new):
    """Without neighbours, where each is exact: KL, Gaussians and nothing else."""
    x, _ = clouds()
    s = {"neighbours": 0, "temperature": 1.0, "z_steps": 1}
    q = F.normalize(x.double(), dim=-1)
    values = []
    for rounds in range(1, 8):
        z = new(**s, iterations=rounds).classify(x).double().softmax(dim=1)
        names = (new().clip.logit_scale.exp() * q.float() @ TEXT.T).double().log_softmax(dim=1)
        means, v = moments(q, z, torch.zeros(4, E).double())
        squares = (q[:, None] - means) ** 2 / v + v.log()
        values.append((z * (squares.sum(2) / 2 + z.clamp(min=1e-300).log() - names)).sum().item())
    assert values[0] - values[-1] > 0.1
    assert (np.diff(values) < 1e-4).all()


def test_without_neighbours_and_bound_to_the_names_it_is_zero_shot(new):
    x, _ = clouds()
    zero_shot = (F.normalize(x, dim=-1) @ TEXT.T).argmax(dim=1)
    free = new(neighbours=0, temperature=1.0).classify(x).argmax(dim=1)
    bound = new(neighbours=0, temperature=1.0, text_weight=1e6).classify(x).argmax(dim=1)
    assert torch.equal(bound, zero_shot)
    assert not torch.equal(free, zero_shot)


def test_clouds_beside_their_names_are_found(new):
    x, labels = clouds(200, spread=0.2)
    zero_shot = (F.normalize(x, dim=-1) @ TEXT.T).argmax(dim=1)
    right = (new(temperature=1.0).classify(x).argmax(dim=1) == labels).double().mean()
    assert (zero_shot == labels).double().mean() < 0.8
    assert right > 0.98


def test_the_order_of_images_does_not_matter_but_their_company_does(new):
    x, _ = clouds()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    logits = new().classify(x)
    torch.testing.assert_close(new().classify(x[order]), logits[order], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(new().classify(x[:20]), logits[:20], atol=1e-3)
    assert torch.equal(new().classify(x), logits)


@pytest.mark.parametrize("names", [NAMES, NAMES[:2]])
@pytest.mark.parametrize("case", ["one", "two", "all alike", "pairs"])
def test_few_images_and_copies(case, names, new):
    x = clouds(8)[0]
    x = {"one": x[:1], "two": x[:2], "all alike": x[:1].repeat(20, 1), "pairs": x.repeat(2, 1)}[
        case
    ]
    logits = new(names).classify(x)
    assert logits.shape == (len(x), len(names))
    assert logits.isfinite().all()
    best = logits.argmax(dim=1)
    if case == "one":
        assert best == (F.normalize(x, dim=-1) @ TEXT[: len(names)].T).argmax(dim=1)
    if case in ("all alike", "pairs"):
        assert torch.equal(best, best[: len(best) // 2].repeat(2))


def test_neighbours_are_found_in_pieces_as_at_once(monkeypatch):
    x = F.normalize(torch.randn(50, E, generator=torch.Generator().manual_seed(1)), dim=-1).double()
    index, cosines = nearest(x, 3, torch.ones(50))
    monkeypatch.setattr(transclip, "ROOM", 333)
    others, again = nearest(x, 3, torch.ones(50))
    assert torch.equal(others, index)
    torch.testing.assert_close(again, cosines)
    brute = NearestNeighbors(n_neighbors=4, metric="cosine").fit(x.numpy())
    distances, found = brute.kneighbors(x.numpy())  # the first is the point itself
    np.testing.assert_array_equal(index.numpy(), found[:, 1:])
    np.testing.assert_allclose(cosines.numpy(), (1 - distances[:, 1:]).clip(min=0), atol=1e-6)


def test_a_class_with_hardly_any_probability_has_a_mean_too():
    x = F.normalize(torch.randn(5, E).double(), dim=-1)
    log_z = torch.tensor([[0.0, -500.0]] * 5).double()
    torch.testing.assert_close(first_means(x, log_z, 8).norm(dim=1), torch.ones(2).double())


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has had while open."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.numel = max(self.numel, leaf.numel())
        return out


def test_memory_is_linear_in_the_images(clip, monkeypatch):
    """5,000 images of 1,000 classes: nothing is larger than z; N x N would be 5 times as much."""
    rng, names = torch.Generator().manual_seed(0), [f"flower {k}" for k in range(1000)]
    text = torch.randn(1000, E, generator=rng)
    monkeypatch.setattr(TransCLIP, "prompt_tree", lambda self: PromptTree(tokenize(["one"])))
    monkeypatch.setattr(TransCLIP, "class_features", lambda self: text)
    method = TransCLIP(clip, names, "{}", TransCLIPSettings(iterations=1, z_steps=2))
    with Largest() as largest:
        logits = method.classify(torch.randn(5000, E, generator=rng))
    assert logits.isfinite().all()
    assert logits.numel() <= largest.numel <= 5000 * 1000


# ------------------------------------------------------------------------------------- few-shot


def test_gamma_is_the_first_of_the_best_on_validation(new, pictures):
    train, val = (pictures(*clouds(n, spread=0.8, seed=n)) for n in (12, 60))
    method = new(use_support=True, temperature=1.0)
    method.fit(train, val, None)
    right = []
    for gamma in GAMMAS:
        one = new(use_support=True, gamma=gamma, temperature=1.0)
        one.fit(train, val, None)
        right.append((one.classify(val.encoded(None)).argmax(1) == val.labels).sum().item())
    assert len(set(right)) > 1
    assert method.gamma.item() == pytest.approx(GAMMAS[right.index(max(right))])


def test_of_equally_good_gammas_the_smallest_is_taken(new, pictures):
    """Clouds far apart: with every γ all of validation is right."""
    train, val = (pictures(*clouds(n, spread=0.02, seed=n)) for n in (12, 60))
    for gamma in GAMMAS:
        one = new(use_support=True, gamma=gamma, temperature=1.0)
        one.fit(train, val, None)
        assert torch.equal(one.classify(val.encoded(None)).argmax(1), val.labels)
    method = new(use_support=True, temperature=1.0)
    method.fit(train, val, None)
    assert method.gamma.item() == pytest.approx(0.1)


def test_the_numbers_are_those_of_the_authors_code():
    s = TransCLIPSettings(**TransCLIP.recipes["default"])
    assert (s.temperature, s.neighbours, s.confident) == (50, 3, 8)
    assert (s.iterations, s.z_steps, s.text_weight, s.use_support) == (10, 5, 1, False)
    few = TransCLIPSettings(**TransCLIP.recipes["few-shot"])
    assert (few.use_support, few.text_weight, few.gamma) == (True, 0.5, -1)
    assert (few.temperature, few.neighbours, few.iterations, few.z_steps) == (50, 3, 10, 5)


def test_gammas_are_fifty_times_those_of_the_authors_code():
    assert pytest.approx([50 * gamma for gamma in (0.002, 0.01, 0.02, 0.2)]) == GAMMAS


def test_training_images_stay_out_unless_asked_for(new, pictures):
    x, (kept, labels) = clouds()[0], clouds(9, seed=5)
    without, using = new(), new(use_support=True, gamma=0.2)
    for method in (without, using):
        method.fit(pictures(kept, labels), None, None)
    assert len(without.support) == 0
    assert torch.equal(without.classify(x), new().classify(x))
    assert not torch.allclose(using.classify(x), without.classify(x), atol=1e-3)
    others = using.for_classes(["daisy", "rose"])  # those of other classes are left out
    few = new(use_support=True, gamma=0.2)
    mine = (labels == 0) | (labels == 2)
    few.fit(pictures(kept[mine], labels[mine]), None, None)
    assert torch.equal(others.classify(x), few.for_classes(["daisy", "rose"]).classify(x))


# ------------------------------------------------------------------------------------- its tasks


def test_all_images_are_one_task_unless_tasks_are_asked_for():
    labels = torch.arange(30) % 5
    for tasks, sizes in ((0, [30]), (3, [12, 12, 12])):
        queries = Queries.of(TransCLIP, TransCLIPSettings(tasks=tasks, k_eff=2), seed=1)
        assert [len(chosen) for chosen in queries.draw(labels)] == sizes
    assert torch.equal(
        Queries.of(TransCLIP, TransCLIPSettings(), 1).draw(labels)[0], torch.arange(30)
    )
