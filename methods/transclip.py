"""TransCLIP: label all test images jointly, with a Gaussian for each class and agreeing neighbours.

Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with Transduction", NeurIPS 2024,
arXiv:2406.01837. Zero-shot CLIP predicts ŷ_n = softmax(s·f_n·norm(W)ᵀ), (K,), for each image alone,
where f_n (E,) is its feature on the unit sphere. All N images together also form clusters: each
class is a Gaussian with mean μ_k (E,) and with variances v (E,) that all classes share. The
assignments z_n (K,) minimise

    Σ_n [ -z_n · log p_n / T          p_nk = N(f_n; μ_k, diag(v)): be near the mean of the class
          - ½ Σ_m a_nm z_n · z_m      neighbours should agree (a Laplacian)
          + KL(z_n ‖ ŷ_n^λ) ]         stay near the zero-shot prediction

with a = (A + Aᵀ) / 2k, where A_nm is the cosine of image n with each of its k nearest neighbours,
and 0 elsewhere. Three updates alternate, each of which minimises the sum, or an upper bound, over
one block of variables:

    (1)  z_n  = softmax(log p_n / T + Σ_m a_nm z_m + λ log ŷ_n)       a few times, all n at once
    (2)  μ_k  = norm(Σ_n z_nk f_n)
    (3)  v    = Σ_nk z_nk (f_n - μ_k)² / N

μ_k starts at the mean of the 8 images with the largest ŷ for class k, weighted by ŷ; v starts at
1/E. After ten rounds, (1) is done once more. The squares in (1) and (3) are multiplied out, so no
array of size N x K x E or N x N is formed, and memory is linear in the number of images.

Few-shot (`--use-support`): S training images keep their labels as z, count as neighbours, and have
weight γ·N/S each in (2) and (3). The mean of a class with training images starts at their mean. γ
is chosen on validation images, which are labelled jointly as well.

The terms are the paper's. All numbers come from the authors' code (TransCLIP_solver), whose γ is a
50th of ours; docs/deviations.md says what else differs with training images. Log densities grow
with E: T = 50 suits 512, and the demo model's 64 needs a smaller T.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.em_dirichlet import JointSettings
from methods.support import WithSupport

GAMMAS = (0.1, 0.5, 1.0, 10.0)
ROOM = 2**22  # cosines between images in memory at once: 32 MB


@dataclass(frozen=True)
class TransCLIPSettings(JointSettings):
    tasks: Annotated[
        int, "batches to label for each half of the classes; 0: one batch of all its test images"
    ] = 0
    text_weight: Annotated[float, "λ, weight of the zero-shot predictions"] = 1.0
    neighbours: Annotated[int, "k, neighbours that each image should agree with"] = 3
    temperature: Annotated[float, "T, divides log densities"] = 50.0
    confident: Annotated[int, "images from which a class's mean starts"] = 8
    iterations: Annotated[int, "rounds of (1), (2), (3)"] = 10
    z_steps: Annotated[int, "updates (1) in each round"] = 5
    use_support: Annotated[bool, "few-shot: use training images with their labels"] = False
    gamma: Annotated[float, "γ, weight of training images; below 0: choose on validation"] = -1.0
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
        """With `use_support`, store the training images and choose γ; nothing else is learned."""
        if not self.settings.use_support:
            return
        self.remember(train)
        if self.settings.gamma < 0:
            right = {}
            for gamma in GAMMAS:
                self.gamma.fill_(gamma)
                guesses = self.classify(val.encoded(self)).argmax(dim=1)
                right[gamma] = (guesses == val.labels).double().mean().item()
            best = max(GAMMAS, key=right.__getitem__)  # of equal values, max returns the first
            self.gamma.fill_(best)
            print(f"γ {best:g}: {100 * right[best]:.2f} % on validation")

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Image features (N, E), all at once -> logits (N, K), whose softmax is the assignment."""
        s, n = self.settings, len(features)
        names = super().classify(features).double().log_softmax(dim=1)  # log ŷ (N, K)
        query, support = F.normalize(features.double(), dim=-1), self.support.double()
        votes = self.votes().double()  # (S, K); a zero row: its class is not among the names
        x = torch.cat([query, support])  # (N + S, E)
        here = torch.cat([query.new_ones(n), votes.sum(dim=1)])  # (N + S,); 0 for these rows
        near = nearest(x, s.neighbours, here)
        weights = here.clone()  # (N + S,)
        weights[n:] *= self.gamma * n / votes.sum().clamp(min=1)

        z = torch.cat([names.exp(), votes])  # (N + S, K)
        shown = votes.sum(dim=0)[:, None] > 0  # (K, 1)
        own = F.normalize(votes.T @ support, dim=-1)
        means = torch.where(shown, own, first_means(query, names, s.confident))  # (K, E)
        variance = x.new_full(x.shape[1:], 1 / x.shape[1])  # (E,)
        for done in range(s.iterations + 1):  # rounds
            if done:
                means, variance = moments(x, weights[:, None] * z, means)  # (2), (3)
            given = log_densities(query, means, variance) / s.temperature + s.text_weight * names
            for _ in range(s.z_steps):  # (1)
                logits = given + agreement(z, *near)[:n]  # (N, K)
                z = torch.cat([logits.softmax(dim=1), votes])
        return logits.float()

    def adapter_state(self) -> dict[str, Tensor]:
        return {**super().adapter_state(), "gamma": self.gamma}


def nearest(x: Tensor, k: int, here: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, E), on the unit sphere -> indices and cosines of the k nearest neighbours (N, k) each.

    Rows where `here` (N,) is 0 are no neighbours; negative cosines become 0.
    """
    cosines, others = [], []
    for part in torch.arange(len(x), device=x.device).split(max(1, ROOM // len(x))):
        found = (x[part] @ x.T).masked_fill(here == 0, -1)  # (part, N)
        found[part - part[0], part] = -inf  # an image is not its own neighbour
        found, index = found.topk(min(k, len(x) - 1), dim=1)
        cosines.append(found.clamp(min=0))
        others.append(index)
    return torch.cat(others), torch.cat(cosines)


def agreement(z: Tensor, others: Tensor, cosines: Tensor) -> Tensor:
    """Σ_m a_nm z_m: z (N, K), and the two results of `nearest`, (N, k) each -> (N, K)."""
    total = torch.zeros_like(z)
    for index, cosine in zip(others.T, cosines.T[:, :, None], strict=True):  # (N,), (N, 1)
        total += cosine * z[index]  # A: the neighbours of n
        total.index_add_(0, index, cosine * z)  # Aᵀ: the images that n is a neighbour of
    return total / (2 * max(1, others.shape[1]))


def first_means(x: Tensor, log_z: Tensor, count: int) -> Tensor:
    """x (N, E), log z (N, K) -> for each class the mean of its `count` images with the largest z,
    (K, E). The weights are normalised, so this works for a class with very small z.
    """
    surest, index = log_z.topk(min(count, len(x)), dim=0)  # (count, K)
    weights = surest.softmax(dim=0)
    rows = [weight @ x[chosen] for weight, chosen in zip(weights.T, index.T, strict=True)]
    return F.normalize(torch.stack(rows), dim=-1)


def log_densities(x: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, diag(variance)), without the terms that all classes share.

    x (N, E), means (K, E), variance (E,) -> (N, K): -½ Σ_e (x - mean)²/variance, multiplied out.
    """
    scaled = means / variance
    return x @ scaled.T - (means * scaled).sum(dim=1) / 2


def moments(x: Tensor, z: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, E), weights z (N, K) -> means (K, E), on the unit sphere, and variance (E,), shared.

    A class without weight keeps its mean. Variances are above 0, even if all images are equal.
    """
    count, sums = z.sum(dim=0), z.T @ x  # (K,), (K, E)
    means = torch.where(count[:, None] > 1e-9, F.normalize(sums, dim=-1), means)
    squares = z.sum(dim=1) @ x.square() - 2 * (sums * means).sum(dim=0) + count @ means.square()
    return means, (squares / count.sum()).clamp(min=1e-8)
