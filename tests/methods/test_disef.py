"""DISEF's loss is its formula, empty parts included, and at λ = 1 it is LoRA."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_min import UserError
from methods.disef import DISEF, DISEF_F1, DISEFSettings, mix
from methods.lora import LoRA, LoRASettings

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
LABELS = torch.tensor([0, 2, 1, 1, 0])
SYNTHETIC = torch.tensor([False, True, False, True, True])
NONE, ALL = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)


def new(clip, kind=DISEF, **settings):
    torch.manual_seed(0)
    make = DISEFSettings if kind is DISEF else LoRASettings
    method = kind(clip, NAMES, TEMPLATE, make(**{"image_rank": 4, "text_rank": 3} | settings))
    torch.manual_seed(1)
    for tensor in method.adapter_state().values():
        torch.nn.init.normal_(tensor, std=0.3)
    return method


def by_hand(logits, labels) -> torch.Tensor:
    """Mean of -log p(label), picture by picture."""
    terms = [-(row[k].exp() / row.exp().sum()).log() for row, k in zip(logits, labels, strict=True)]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("lam", [0.8, 0.95, 0.0, 0.3])
def test_the_loss_is_its_formula(new_clip, images, lam):
    method = new(new_clip(), lam=lam, dropout=0.0)
    logits = method(images).double()
    real, painted = logits[[0, 2]], logits[[1, 3, 4]]
    expected = lam * by_hand(real, [0, 1]) + (1 - lam) * by_hand(painted, [2, 1, 0])
    assert method.loss(images, LABELS, SYNTHETIC).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_empty_part_is_0(new_clip, images):
    method = new(new_clip(), lam=0.8, dropout=0.0)
    whole = by_hand(method(images).double(), LABELS.tolist()).item()
    assert method.loss(images, LABELS, NONE).item() == pytest.approx(0.8 * whole, rel=1e-5)
    assert method.loss(images, LABELS, ALL).item() == pytest.approx(0.2 * whole, rel=1e-5)
    for mask in (NONE, ALL):
        method.zero_grad()
        method.loss(images, LABELS, mask).backward()
        gradients = [p.grad for p in method.adapter_state().values()]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("synthetic", [SYNTHETIC, NONE, ALL])
def test_balanced_terms_are_weighted_means(synthetic, new_clip, images):
    """λ stays the share of the real images, whatever their weights are."""
    method = new(new_clip(), lam=0.7, dropout=0.0)
    weights = method.class_weights = torch.tensor([0.2, 3.0, 10.0])
    logits = method(images)
    real, painted = (
        F.cross_entropy(logits[part], LABELS[part], weights) if part.any() else 0.0
        for part in (~synthetic, synthetic)
    )
    found = method.loss(images, LABELS, synthetic)
    torch.testing.assert_close(found, 0.7 * real + 0.3 * painted)
    found.backward()
    assert all(p.grad.isfinite().all() for p in method.adapter_state().values())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("lam", [0.8, 1.0])
def test_kinds_are_drawn_apart_if_that_is_asked(apart, lam, new_clip):
    asked = []

    class Train:
        def draw_apart(self):
            asked.append("apart")

        def real(self):
            return "real"

    descended = []
    method = new(new_clip(), lam=lam, apart=apart)
    method.fit(train := Train(), "val", lambda *what: descended.append(what))
    assert asked == ["apart"] * (apart and lam < 1)
    assert descended == [(method, "real" if lam == 1 else train, "val")]


def test_label_smoothing_is_torchs(new_clip, images):
    method = new(new_clip(), lam=0.6, label_smoothing=0.1, dropout=0.0)
    logits = method(images)
    one, other = (
        F.cross_entropy(logits[mask], LABELS[mask], label_smoothing=0.1)
        for mask in (~SYNTHETIC, SYNTHETIC)
    )
    found = method.loss(images, LABELS, SYNTHETIC)
    torch.testing.assert_close(found, 0.6 * one + 0.4 * other)


def timms(images, labels, mixup, cutmix, monkeypatch):
    """timm's Mixup, which DISEF's code copies, given the draws that ours will make."""
    from timm.data.mixup import Mixup

    before = torch.get_rng_state()
    cut = torch.rand(()).item() if mixup and cutmix else (0.0 if cutmix else 1.0)
    a = torch.tensor(cutmix if cut < 0.5 else mixup)
    m = torch.distributions.Beta(a, a).sample().item()
    middles = iter(torch.randint(images.shape[-1], (2,)).tolist())
    torch.set_rng_state(before)
    draws = iter([0.0, cut])  # whether to mix at all, and which way
    monkeypatch.setattr(np.random, "rand", lambda: next(draws))
    monkeypatch.setattr(np.random, "beta", lambda *_: m)
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(middles))
    mixed = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=3)
    return *mixed(images.clone(), labels), cut < 0.5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.1, 0.1), (0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_images_and_labels_are_mixed_as_timm_does(mixup, cutmix, images, monkeypatch):
    ways = set()
    for seed in range(12):
        torch.manual_seed(seed)
        x, y, cut = timms(images[:4], LABELS[:4], mixup, cutmix, monkeypatch)
        ways.add(cut)
        found_x, found_y = mix(images[:4], F.one_hot(LABELS[:4], 3).float(), mixup, cutmix)
        torch.testing.assert_close(found_x, x)
        torch.testing.assert_close(0.9 * found_y + 0.1 / 3, y)  # label smoothing comes after
    assert len(ways) == (2 if mixup and cutmix else 1)


@pytest.mark.parametrize("synthetic", [None, SYNTHETIC])
def test_each_part_of_a_batch_is_mixed_within_itself(synthetic, new_clip, images):
    s = {"mixup": 0.3, "cutmix": 0.6, "label_smoothing": 0.1, "lam": 0.7}
    method, before = new(new_clip(), dropout=0.0, **s), images.clone()
    torch.manual_seed(2)
    found = method.loss(images, LABELS, synthetic)
    torch.manual_seed(2)
    parts = [slice(None)] if synthetic is None else [~synthetic, synthetic]
    terms = []
    for part in parts:
        x, y = mix(images[part], F.one_hot(LABELS[part], 3).float(), 0.3, 0.6)
        terms.append(-((0.9 * y + 0.1 / 3) * method(x).log_softmax(dim=1)).sum(dim=1).mean())
    expected = terms[0] if synthetic is None else 0.7 * terms[0] + 0.3 * terms[1]
    torch.testing.assert_close(found, expected)
    assert torch.equal(images, before)


def test_images_go_through_the_tower_once(new_clip, images, monkeypatch):
    method, seen = new(new_clip()), []
    tower = method.clip.visual
    encode = tower.forward
    monkeypatch.setattr(tower, "forward", lambda x: (seen.append(len(x)), encode(x))[1])
    method.loss(images, LABELS, SYNTHETIC)
    assert seen == [5]


def test_gradients_at_lambda_1_are_loras_on_the_real_images(new_clip, images):
    disef, lora = new(new_clip(), lam=1, dropout=0.0), new(new_clip(), LoRA, dropout=0.0)
    disef.loss(images, LABELS, SYNTHETIC).backward()
    lora.loss(images[~SYNTHETIC], LABELS[~SYNTHETIC]).backward()
    for name, tensor in lora.adapter_state().items():
        torch.testing.assert_close(disef.get_parameter(name).grad, tensor.grad)


def test_without_synthetic_images_loss_and_gradients_are_loras_to_the_bit(new_clip, images):
    disef, lora = new(new_clip()), new(new_clip(), LoRA)
    for method in (disef, lora):
        torch.manual_seed(5)  # for dropout
        method.loss(images, LABELS).backward()
    for name, tensor in lora.adapter_state().items():
        assert torch.equal(disef.get_parameter(name).grad, tensor.grad)


@pytest.mark.parametrize(("lam", "joined"), [(1, False), (0.8, True)])
def test_at_lambda_1_synthetic_images_are_left_out(new_clip, lam, joined):
    class Train:
        def real(self):
            return "real"

    train, given = Train(), []
    new(new_clip(), lam=lam).fit(train, "val", lambda *arguments: given.append(arguments[1:]))
    assert given == [(train if joined else "real", "val")]


def test_recipes():
    names = ("notebook", "improved", "paper")
    notebook, improved, paper = (DISEFSettings(**DISEF.recipes[name]) for name in names)
    assert (notebook.lam, notebook.lr, notebook.weight_decay) == (0.8, 2e-4, 1e-2)
    assert (notebook.epochs, notebook.patience, notebook.batch_size) == (50, 4, 32)
    assert (improved.lam, improved.lr, improved.plan, improved.filter) == (0.95, 2e-5, "f1", "lora")
    assert (paper.batch_size, paper.weight_decay, paper.label_smoothing) == (64, 1e-3, 0.1)
    assert (paper.apart, paper.drop_last, paper.lam, paper.epochs) == (True, True, 0.8, 50)
    assert (paper.mixup, paper.cutmix, paper.augment) == (0.1, 0.1, "randaugment-crop")
    assert (paper.schedule, paper.min_lr, paper.patience, paper.keep) == ("step", 1e-7, 0, "last")
    points = DISEFSettings(**DISEF.recipes["paper-grid"]).points()
    assert [math.log2(point["lr"]) for point in points] == list(range(-15, -9))
    assert {"lr": paper.lr} in points
    assert DISEF_F1.recipes["improved"] == DISEF.recipes["improved"]


@pytest.mark.parametrize("settings", [{"lam": 1.1}, {"lam": -0.1}, {"label_smoothing": 2.0}])
def test_a_weight_out_of_range_is_refused(settings):
    with pytest.raises(UserError, match="expected 0 to 1"):
        DISEFSettings(**settings)
