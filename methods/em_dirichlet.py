"""EM-Dirichlet: label a batch of test images jointly, with no training.

Martin et al., "Transductive Zero-Shot and Few-Shot CLIP", CVPR 2024, arXiv:2405.18437. Zero-shot
CLIP maps image n to a point on the simplex, z_n = softmax(T · cos(f_n, W)), (K,). If the images of
a batch come from few classes, the points form clusters, and a cluster tells more than a single
point. Each class k is modelled as a Dirichlet distribution with parameters α_k (K,). The
assignments u_n (K,) start at z_n, and three updates alternate:

    (1)  α_k  raises  Σ_n u_nk · log Dir(z_n | α_k)      majorise-minimise steps, `mm_step`
    (2)  π_k  = mean_n u_nk                              the share of class k in the batch
    (3)  u_n  = softmax_k(log Dir(z_n | α_k) + λ log π_k)             hard: one-hot at the largest

With λ = 1 and soft assignments this is the EM algorithm for a mixture of Dirichlets with mixing
proportions π. It finds too many classes: a Dirichlet fitted to two images suits them better than
any other. A larger λ prefers fewer classes. The default λ and the small number of steps in (1) were
chosen on the demo task's validation images. The published code sets λ to K/5, rounded down, which
is also 10 for the halves of that task. (With training images, that code divides K by the number of
classes in a batch, also 5.) With `--use-support`, training images take part in (1) with their known
labels. A class without any image keeps its α.

The published code runs 20 rounds (10 with hard assignments), and repeats (1) until α hardly
changes, 1,000 steps at most: `--recipe paper`, or `paper-few-shot` with training images; for hard
assignments add `--assignment hard --iterations 10`. What we do differently: the published zero-shot
accuracy matches clusters to names again before it counts, and each published few-shot task draws
its own training images; see also fewshot/transductive.py.

A label depends on the whole batch: in another batch the same image may get another name. Results
are therefore reported over tasks, and not compared with methods that label one image at a time.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import UserError
from clip_min.memory import check_room, free_memory
from methods.support import WithSupport
from methods.templates import TemplateSettings

TINY = 1e-15  # as in the published code: a weight below it is none
TABLES = 17  # arrays (K, K) of float64 in memory at once while α is fitted


@dataclass(frozen=True)
class JointSettings(TemplateSettings):
    """Which batches of test images are labelled jointly."""

    tasks: Annotated[
        int, "batches to label for each half of the classes; 0: one batch of all its test images"
    ] = 200
    queries: Annotated[int, "Q, images in a batch, at most"] = 75
    k_eff: Annotated[int, "classes that a batch's images come from, unknown to the method"] = 5
    k_eff_max: Annotated[int, "if not 0: draw the number of classes from --k-eff to this"] = 0
    limits = {"tasks": (0, inf), "queries": (1, inf), "k_eff": (1, inf), "k_eff_max": (0, inf)}

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.k_eff_max < self.k_eff:
            raise UserError(
                f"--k-eff-max {self.k_eff_max}: expected 0, or --k-eff {self.k_eff} or more"
            )


@dataclass(frozen=True)
class EMDirichletSettings(JointSettings):
    temperature: Annotated[float, "T, in the softmax that maps an image to the simplex"] = 30.0
    balance: Annotated[
        float, "λ, weight of the class proportions; 1: EM; below 0: K/5, rounded down"
    ] = 10.0
    assignment: Annotated[Literal["soft", "hard"], "u: probabilities, or a single class"] = "soft"
    iterations: Annotated[int, "rounds of (1), (2), (3)"] = 10
    mm_steps: Annotated[int, "steps of (1) in each round, at most"] = 10
    mm_tolerance: Annotated[
        float, "every 50 steps: stop (1) if ‖change of α‖² / ‖α‖² is below this"
    ] = 0.0
    use_support: Annotated[bool, "few-shot: use training images with their labels"] = False
    limits = {
        **JointSettings.limits,
        "temperature": (0, 1e6),  # far above, points lie on corners, where densities are infinite
        "balance": (-1, inf),
        "iterations": (1, inf),
        "mm_steps": (1, inf),
        "mm_tolerance": (0, inf),
    }


PUBLISHED = {  # T = 30, as here
    "balance": -1.0,
    "iterations": 20,
    "mm_steps": 1000,
    "mm_tolerance": 1e-11,
    "tasks": 1000,
}


class EMDirichlet(WithSupport):
    title = "label a batch of test images jointly (transductive)"
    Settings = EMDirichletSettings
    settings: EMDirichletSettings
    recipes = {
        "default": {},
        "few-shot": {"use_support": True},
        "paper": {**PUBLISHED, "k_eff": 3, "k_eff_max": 10},
        "paper-few-shot": {**PUBLISHED, "use_support": True},
        "demo": {"temperature": 5.0},
    }
    transductive = True

    def set_classes(self, classnames: list[str]) -> None:
        """As in the base class; UserError, if α would not fit into memory."""
        what = f"em_dirichlet: {len(classnames):,} classes, with as many parameters each, take"
        needed, free = TABLES * 8 * len(classnames) ** 2, free_memory(self.clip.device)
        check_room(needed, free, what, "give fewer, or use transclip")
        super().set_classes(classnames)

    def fit(self, train, val, descend) -> None:
        """Store the training images with `use_support`; nothing else is learned."""
        if self.settings.use_support:
            self.remember(train)

    def classify(self, features: Tensor) -> Tensor:
        """Image features (Q, E), one task -> logits (Q, K), whose softmax is the assignment."""
        settings = self.settings
        text = F.normalize(self.class_features().double(), dim=-1)  # (K, E)

        def log_z(x: Tensor) -> Tensor:  # log of the points on the simplex, (N, K)
            x = settings.temperature * F.normalize(x.double(), dim=-1)  # (N, E)
            return (x @ text.T).log_softmax(dim=-1)

        query = log_z(features)  # (Q, K)
        votes = self.votes().double()  # (N, K); a zero row: its class is not among the names
        known = votes.sum(dim=1) > 0
        points = torch.cat([query, log_z(self.support[known])])  # (Q + N, K)
        u = query.exp()  # (Q, K)
        alpha = text.new_ones(len(text), len(text))  # (K, K): a row per class
        balance = settings.balance if settings.balance >= 0 else len(text) // 5  # λ
        for _ in range(settings.iterations):
            weights = torch.cat([u, votes[known]])  # (Q + N, K)
            limits = settings.mm_steps, settings.mm_tolerance
            alpha = fit_dirichlets(alpha, points, weights, *limits)  # (1)
            proportions = u.mean(dim=0) + TINY  # (2): π, (K,)
            logits = log_dirichlet(query, alpha) + balance * proportions.log()  # (Q, K)
            u = logits.softmax(dim=-1)  # (3)
            if settings.assignment == "hard":
                u = F.one_hot(u.argmax(dim=-1), u.shape[-1]).double()
        return logits.float()


def log_dirichlet(log_z: Tensor, alpha: Tensor) -> Tensor:
    """Log density of points (N, D), given as logarithms, under K Dirichlets (K, D) -> (N, K).

    D: the corners of the simplex, which are the K classes in `classify`.
    """
    constant = alpha.sum(dim=-1).lgamma() - alpha.lgamma().sum(dim=-1)  # (K,)
    return log_z @ (alpha - 1).T + constant


def fit_dirichlets(
    alpha: Tensor, log_z: Tensor, u: Tensor, steps: int, tolerance: float = 0.0
) -> Tensor:
    """From alpha (K, D), `steps` steps of weighted maximum likelihood -> alpha (K, D).

    log_z (N, D) points as logarithms; u (N, K) their weights. The maximum is where
    ψ(α_i) - ψ(Σα) = t_i, the weighted mean of log z_i. A class without weight keeps its alpha. As
    in the published code, the steps stop if step 51, 101 … changes α by less than `tolerance`.
    """
    weight = u.sum(dim=0)  # (K,)
    held = weight > TINY
    means = (u[:, held] / weight[held]).T @ log_z  # (held, D), t
    fitted = alpha[held]
    for step in range(steps):
        last, fitted = fitted, mm_step(fitted, means)
        asked = step > 0 and step % 50 == 0
        if asked and (fitted - last).norm() ** 2 < tolerance * last.norm() ** 2:
            break
    alpha = alpha.clone()
    alpha[held] = fitted
    return alpha


def mm_step(alpha: Tensor, means: Tensor) -> Tensor:
    """One majorise-minimise step on alpha (..., D), which never lowers the likelihood

        ln Γ(Σα) + Σ_i [ -ln Γ(α_i) + α_i t_i ]                      t = means (..., D)

    Each term is replaced by a lower bound that touches it at the current α. ln Γ(Σα) is convex: its
    tangent. -ln Γ(α_i) = ln α_i - φ(α_i), with φ(α) = ln Γ(α + 1): a parabola below -φ. Since φ' is
    concave, the flattest parabola above φ is the one that meets φ again at 0 (Erdoğan and Fessler,
    "Monotonic algorithms for transmission tomography", 1999):

        φ(x) <= φ(α) + φ'(α)(x - α) + c/2·(x - α)²,     c = 2(φ(0) - φ(α) + α·φ'(α)) / α²

    It remains to maximise ln x + b·x - c/2·x² for each x by itself: a quadratic equation.
    """
    phi, slope = (alpha + 1).lgamma(), (alpha + 1).digamma()
    # Near 0 the formula loses all digits; there c tends to φ''(0) = π²/6.
    c = torch.where(alpha > 1e-3, 2 * (alpha * slope - phi) / alpha**2, torch.pi**2 / 6)
    b = means + alpha.sum(dim=-1, keepdim=True).digamma() - slope + c * alpha
    return (b + (b**2 + 4 * c).sqrt()) / (2 * c)
