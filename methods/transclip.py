"""TransCLIP: label all test images jointly: a Gaussian for each class, neighbours that agree.

Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024,
arXiv:2406.01837. Zero-shot CLIP says ŷ_n = softmax(s · f_n·Wᵀ), (K,), of each image alone, f_n (E,)
its feature on the unit sphere. All N images together also show where they gather: a class is a
Gaussian, of mean μ_k (E,) and of variances v (E,) that all classes share. The assignments z_n (K,)
are those that lower

    Σ_n [ -z_n · log p_n / T          p_nk = N(f_n; μ_k, diag(v)): be near the mean of your class
          - ½ Σ_m a_nm z_n · z_m      neighbours should agree (a Laplacian)
          + KL(z_n ‖ ŷ_n^λ) ]         and stay near what the names say

with a = (A + Aᵀ) / 2k, A_nm the cosine of image n and each of its k nearest others, 0 elsewhere. In
turn, each block of variables takes the best values, or those of a bound, given the others:

    (1)  z_n  = softmax(log p_n / T + Σ_m a_nm z_m + λ log ŷ_n)       a few times, all n at once
    (2)  μ_k  = norm(Σ_n z_nk f_n)
    (3)  v    = Σ_nk z_nk (f_n - μ_k)² / N

μ_k starts at the mean of the 8 images that ŷ is surest of for class k, weighted by it, v at 1/E.
The squares in (1) and (3) are multiplied out, so that nothing of the size N x K x E is formed, nor
of N x N: memory is linear in the images.

Few-shot (`--use-support`): S training images keep their labels as z, are neighbours, too, and count
γ·N/S each in (2) and (3). A class that has some starts at their mean. γ is chosen on validation
images, which are labelled jointly for that.

The terms are the paper's; k = 3, T = 50, the 2k, unit means, the 8 and 1/E are in the guide that
its authors give beside their code. Not checked against either: λ (1, or 0.5 with training images),
ten rounds of five updates, the values γ is chosen from, and how means start where there are
training images. Log densities grow with E: T = 50 is for 512, and the demo model's 64 want less.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.em_dirichlet import JointSettings
from methods.support import WithSupport

GAMMAS = (0.002, 0.01, 0.02, 0.2)
ROOM = 2**22  # cosines of images with all others that are in memory at once, 32 MB


@dataclass(frozen=True)
class TransCLIPSettings(JointSettings):
    tasks: Annotated[
        int, "batches to label, for each half of the classes; 0: one, of all its test images"
    ] = 0
    text_weight: Annotated[float, "λ, how strongly the zero-shot predictions hold"] = 1.0
    neighbours: Annotated[int, "k, images that each image should agree with"] = 3
    temperature: Annotated[float, "T, which log densities are divided by"] = 50.0
    confident: Annotated[int, "images that a class's mean starts from"] = 8
    iterations: Annotated[int, "rounds of (1), (2), (3)"] = 10
    z_steps: Annotated[int, "updates (1) in each of them"] = 5
    use_support: Annotated[bool, "few-shot: training images join in with their labels"] = False
    gamma: Annotated[float, "γ, what these weigh; below 0: chosen on validation"] = -1.0
    limits = {
        **JointSettings.limits,
        "text_weight": (0, inf),
        "neighbours": (0, inf),
        "temperature": (1e-6, inf),
        "confident": (1, inf),
        "iterations": (1, inf),
        "z_steps": (1, inf),
    }


class TransCLIP(WithSupport):
    title = "label all test images jointly: Gaussians and neighbours (transductive)"
    Settings = TransCLIPSettings
    settings: TransCLIPSettings
    recipes = {
        "default": {},
        "few-shot": {"use_support": True, "text_weight": 0.5},
        "demo": {"temperature": 5.0, "text_weight": 0.1},
    }
    demo_model = {"temperature": 5.0}
    transductive = True

    def __init__(self, clip, classnames, template, settings: TransCLIPSettings):
        super().__init__(clip, classnames, template, settings)
        self.gamma = torch.tensor(max(settings.gamma, 0.0), device=clip.device)

    def fit(self, train, val, descend) -> None:
        """Nothing is learned; with `use_support`, training images are kept, and γ is chosen."""
        if not self.settings.use_support:
            return
        self.remember(train)
        if self.settings.gamma < 0:
            right = {}
            for gamma in GAMMAS:
                self.gamma.fill_(gamma)
                guesses = self.classify(val.encoded(self)).argmax(dim=1)
                right[gamma] = (guesses == val.labels).double().mean().item()
            best = max(GAMMAS, key=right.__getitem__)  # of equals, max takes the first
            self.gamma.fill_(best)
            print(f"γ {best:g}: {100 * right[best]:.2f} % on validation")

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Image features (N, E), all at once -> logits (N, K), whose softmax is the assignment."""
        s, n = self.settings, len(features)
        names = super().classify(features).double().log_softmax(dim=1)  # log ŷ (N, K)
        query, support = F.normalize(features.double(), dim=-1), self.support.double()
        votes = self.votes().double()  # (S, K); all zero: an image of a class not asked for
        x = torch.cat([query, support])  # (N + S, E)
        here = torch.cat([query.new_ones(n), votes.sum(dim=1)])  # (N + S,), 0: such an image
        near = nearest(x, s.neighbours, here)
        weights = here.clone()  # (N + S,)
        weights[n:] *= self.gamma * n / votes.sum().clamp(min=1)

        z = torch.cat([names.exp(), votes])  # (N + S, K)
        shown = votes.sum(dim=0)[:, None] > 0  # (K, 1)
        own = F.normalize(votes.T @ support, dim=-1)
        means = torch.where(shown, own, first_means(query, names, s.confident))  # (K, E)
        variance = x.new_full(x.shape[1:], 1 / x.shape[1])  # (E,)
        for _ in range(s.iterations):
            given = log_densities(query, means, variance) / s.temperature + s.text_weight * names
            for _ in range(s.z_steps):  # (1)
                logits = given + agreement(z, *near)[:n]  # (N, K)
                z = torch.cat([logits.softmax(dim=1), votes])
            means, variance = moments(x, weights[:, None] * z, means)  # (2), (3)
        return logits.float()

    def adapter_state(self) -> dict[str, Tensor]:
        return {**super().adapter_state(), "gamma": self.gamma}


def nearest(x: Tensor, k: int, here: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, E), on the unit sphere -> the numbers of the k nearest others, and the cosines (N, k).

    Where `here` (N,) is 0 is none; a negative cosine is 0.
    """
    cosines, others = [], []
    for part in torch.arange(len(x), device=x.device).split(max(1, ROOM // len(x))):
        found = (x[part] @ x.T).masked_fill(here == 0, -1)  # (part, N)
        found[part - part[0], part] = -inf  # nobody is a neighbour of oneself
        found, index = found.topk(min(k, len(x) - 1), dim=1)
        cosines.append(found.clamp(min=0))
        others.append(index)
    return torch.cat(others), torch.cat(cosines)


def agreement(z: Tensor, others: Tensor, cosines: Tensor) -> Tensor:
    """Σ_m a_nm z_m: z (N, K), and what `nearest` gives, (N, k) each -> (N, K)."""
    total = torch.zeros_like(z)
    for index, cosine in zip(others.T, cosines.T[:, :, None], strict=True):  # (N,), (N, 1)
        total += cosine * z[index]  # A: those that n is near to
        total.index_add_(0, index, cosine * z)  # Aᵀ: those that are near to n
    return total / (2 * max(1, others.shape[1]))


def first_means(x: Tensor, log_z: Tensor, count: int) -> Tensor:
    """x (N, E), log z (N, K) -> of each class the mean of its `count` surest, by z, (K, E).

    Of a class that hardly has any z, too: its weights count beside each other.
    """
    surest, index = log_z.topk(min(count, len(x)), dim=0)  # (count, K)
    weights = surest.softmax(dim=0)
    rows = [weight @ x[chosen] for weight, chosen in zip(weights.T, index.T, strict=True)]
    return F.normalize(torch.stack(rows), dim=-1)


def log_densities(x: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, diag(variance)) but for what all classes share.

    x (N, E), means (K, E), variance (E,) -> (N, K): of -½ Σ_e (x - mean)²/variance, multiplied out.
    """
    scaled = means / variance
    return x @ scaled.T - (means * scaled).sum(dim=1) / 2


def moments(x: Tensor, z: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, E), weights z (N, K) -> means (K, E), on the unit sphere, and variance (E,), shared.

    A class without weight keeps its mean. No variance is 0, as of images that are all alike.
    """
    count, sums = z.sum(dim=0), z.T @ x  # (K,), (K, E)
    means = torch.where(count[:, None] > 1e-9, F.normalize(sums, dim=-1), means)
    squares = z.sum(dim=1) @ x.square() - 2 * (sums * means).sum(dim=0) + count @ means.square()
    return means, (squares / count.sum()).clamp(min=1e-8)
