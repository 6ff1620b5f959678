"""--balance: classes weigh alike in the loss, however many training images each has."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight

from clip_min import CLIP, CLIPConfig, UserError
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from methods import METHODS
from methods.linear_probe import logistic_regression

NAMES = ["rose", "tulip", "lily"]
BALANCED = [n for n, m in METHODS.items() if getattr(m.Settings(), "balance", 0.0) is False]


def batches(counts: list[int]) -> Batches:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    return Batches(Pictures(images, labels), images, Reader(32))


def test_weights_are_scikit_learns():
    some = batches([2, 5, 13])
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=some.labels.numpy())
    torch.testing.assert_close(some.class_weights(3).double(), torch.from_numpy(theirs))
    assert some.class_weights(4)[3].isfinite()  # a class without pictures


def test_synthetic_pictures_do_not_count():
    some = batches([2, 4])
    joined = some.join(batches([50, 1]))
    assert joined.class_weights(2).tolist() == some.class_weights(2).tolist() == [1.5, 0.75]


@pytest.mark.parametrize("c", [0.1, 3.0])
def test_the_balanced_probe_is_scikit_learns(c):
    rng = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 5)
    x = torch.randn(57, 6, generator=rng) + labels[:, None] * 0.7
    weights = 57 / (3 * labels.bincount())
    w, b = (t.numpy() for t in logistic_regression(x, labels, 3, c, weights=weights))
    # Theirs sums the loss, ours means it: by weights that are 1 on average the two agree.
    model = LogisticRegression(C=c, class_weight="balanced", solver="newton-cg", tol=1e-9)
    theirs = model.fit(x.double().numpy(), labels.numpy())
    assert abs(w - theirs.coef_).max() < 1e-4 * abs(theirs.coef_).max()
    centred = theirs.intercept_ - theirs.intercept_.mean()
    assert abs(b - b.mean() - centred).max() < 1e-3


def test_every_method_that_learns_by_gradients_has_it():
    from methods import TrainingSettings

    learn = {n for n, m in METHODS.items() if issubclass(m.Settings, TrainingSettings)}
    assert {*BALANCED} == learn | {"linear_probe"}


@pytest.mark.parametrize("name", [name for name in BALANCED if name != "linear_probe"])
def test_each_class_weighs_as_it_is_told_to(name):
    """The classification term is a weighted mean; other terms have no classes to weigh."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(16, 32, 16, 64, 2, 1, 64, 2, 1)).eval()
    method = METHODS[name](clip, NAMES, "a {}.", METHODS[name].Settings()).eval()
    if name == "tip_adapter_f":
        method.remember(batches([2, 2, 2]))
    x = method.encode(torch.randn(6, 3, 32, 32))
    labels = torch.tensor([0, 0, 0, 0, 1, 2])

    def loss(weights=None) -> float:
        torch.manual_seed(3)
        method.class_weights = weights
        return method.loss(x, labels).item()

    assert loss(torch.ones(3)) == pytest.approx(loss(), rel=1e-6)
    weights = torch.tensor([0.1, 5.0, 1.0])
    moved = loss(weights) - loss()
    with torch.no_grad():
        logits, truth = method.classify(x), labels
        if name == "cross_modal":  # texts are examples as well
            texts = method.texts()[:6]
            logits = torch.cat([logits, method.classify(method.class_features()[texts])])
            truth = torch.cat([labels, texts])
        each = F.cross_entropy(logits, truth, reduction="none")
        weighted = (each * weights[truth]).sum() / weights[truth].sum()
    assert abs(moved) > 1e-4
    assert moved == pytest.approx((weighted - each.mean()).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["finetune", "projection"])
def test_pairs_have_no_classes_to_weigh(name):
    with pytest.raises(UserError, match="--balance weights classes, .* --objective class"):
        METHODS[name].Settings(objective="contrastive", balance=True)


def test_skip_tuning_weighs_the_classes_of_its_step():
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(16, 32, 16, 64, 2, 1, 64, 2, 1)).eval()
    settings = METHODS["finetune"].Settings(class_share=0.5)
    method = METHODS["finetune"](clip, [*NAMES, "daisy"], "a {}.", settings).eval()
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([3, 3, 1])
    method.class_weights = torch.tensor([9.0, 2.0, 9.0, 1.0])
    with torch.no_grad():
        logits = method.classify(x)[:, [1, 3]]  # half of four classes: those of the images
        expected = F.cross_entropy(logits, torch.tensor([1, 1, 0]), torch.tensor([2.0, 1.0]))
        torch.testing.assert_close(method.loss(x, labels), expected)
