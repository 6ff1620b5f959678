"""Linear probe: logistic regression on image features; no text at all.

Radford et al. (CLIP), arXiv:2103.00020, section 3.2 and appendix A.3. On the image feature f (E,)
as the tower gives it, not normalised,

    logits = f·Wᵀ + b                                                     W (K, E), b (K,)

    W, b = argmin   Σ_n CE(logits_n, label_n)  +  ‖W‖² / (2C)

The problem is convex: L-BFGS finds the minimum, without a learning rate or a seed. Only C, the
inverse strength of the penalty, is chosen, by accuracy on validation: a sweep over 10^-6 … 10^6,
then eight pairs around the best, each half as far from it. Candidates above 10^-2, which take most
of the time, are solved roughly in float32, since few predictions depend on the last digits; the
chosen C is solved in float64. A probe cannot name a class without training images, so its novel
column reads n/a.

f is the feature that CLIP compares with texts, as in the example of OpenAI's code and in the probe
of CoOp's code. The paper's own numbers are of the feature before the tower's last projection, and
of a last fit to training and validation images together.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import BaseSettings, Method

SWEEP = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # log10 C
HALVINGS = 8
ROOM = 2**24  # logits in memory at once: 64 MB, or 128


@dataclass(frozen=True)
class LinearProbeSettings(BaseSettings):
    c: Annotated[float, "C, inverse strength of the L2 penalty; 0: choose on validation"] = 0
    max_iterations: Annotated[int, "steps of L-BFGS for each C, at most"] = 1000
    balance: Annotated[
        bool, "weight each class in the loss by 1 / its number of training images"
    ] = False
    limits = {"c": (0, float("inf")), "max_iterations": (1, float("inf"))}


class LinearProbe(Method):
    title = "logistic regression on image features, no text"
    Settings = LinearProbeSettings
    settings: LinearProbeSettings
    recipes = {"paper": {}}
    names_unseen = False
    starts_over = True

    def __init__(self, clip, classnames, template, settings: LinearProbeSettings):
        super().__init__(clip, classnames, template, settings)
        self.head = nn.Linear(clip.config.embed_dim, len(classnames)).to(clip.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def classify(self, x: Tensor) -> Tensor:
        """Image features x (B, E) -> logits (B, K)."""
        with self.float32():
            return self.head(x.float())

    def matrix(self) -> dict[str, Tensor]:
        return {"weight": self.head.weight, "bias": self.head.bias}

    def fit(self, train, val, descend) -> None:
        """Solve for W and b, with the best C on validation; of equally good ones, the smallest."""
        x, y, val_x = train.encoded(self), train.labels, val.encoded(self)
        weights = train.class_weights(len(self.classnames)) if self.settings.balance else None

        def solve(c: float, rough: bool = False) -> tuple[Tensor, Tensor]:
            classes, most = len(self.classnames), self.settings.max_iterations
            return logistic_regression(x, y, classes, c, most, rough, weights)

        def accuracy(w: Tensor, b: Tensor) -> float:
            right = (val_x.double() @ w.T + b).argmax(dim=1) == val.labels
            return right.double().mean().item()

        def judge(log_c: float) -> tuple[float, float]:
            """(-accuracy on validation, log10 C): the minimum is the best, then the smallest C."""
            # A small C makes W tiny. Small errors would then change predictions, and steps are few.
            return -accuracy(*solve(10**log_c, rough=log_c > -2)), log_c

        if self.settings.c:
            w, b = solve(self.settings.c)
        else:
            best = min(map(judge, SWEEP))
            step = (SWEEP[1] - SWEEP[0]) / 2
            for _ in range(HALVINGS):
                best = min(best, judge(best[1] - step), judge(best[1] + step))
                step /= 2
            w, b = solve(10 ** best[1])
            print(f"C = {10 ** best[1]:.4g}: {100 * accuracy(w, b):.2f} % on validation")
        with torch.no_grad():
            self.head.weight.copy_(w)
            self.head.bias.copy_(b)


def logistic_regression(
    x: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    max_iterations: int = 1000,
    rough: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, E), labels (N,) -> W (K, E) and b (K,), float64: the argmin above.

    weights (K,): weight of each class in the loss, 1 on average. rough: in float32, until the
    gradient of the mean objective is below 1e-5 (else 1e-8).
    """
    x = x.double()
    mean = x.mean(dim=0)  # b absorbs it: f·Wᵀ + b = (f - mean)·Wᵀ + (b + mean·Wᵀ)
    x = x - mean  # all features share a large component, along which L-BFGS would zigzag
    x = x.float() if rough else x
    # L-BFGS needs gradients of one scale, so it optimises v = W / scale: with a strong penalty W is
    # tiny, and its error would be as large as W.
    scale = min(1.0, c**0.5)
    few = max(1, ROOM // classes)  # images whose logits are in memory at once
    weights = x.new_ones(classes) if weights is None else weights.to(x.dtype)
    total = weights[labels].sum()
    v = x.new_zeros(classes, x.shape[1]).requires_grad_()  # (K, E)
    b = x.new_zeros(classes).requires_grad_()
    # The objective is divided by N, so that its gradient has the same scale for any N and C.
    optimizer = torch.optim.LBFGS(
        [v, b],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,  # torch's 100 would take longer than the objective
        tolerance_grad=1e-5 if rough else 1e-8,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = (scale * v).square().sum() / (2 * c * len(x))
        value.backward()
        value = value.detach()
        for some, right in zip(x.split(few), labels.split(few), strict=True):
            logits = F.linear(some, scale * v, b)  # (n, K)
            part = F.cross_entropy(logits, right, weights, reduction="sum") / total
            part.backward()
            value += part.detach()
        return value

    optimizer.step(objective)
    w = scale * v.detach().double()
    return w, b.detach().double() - w @ mean
