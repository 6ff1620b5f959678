"""The contrastive loss by its definition, and the two methods that train with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_min import CLIP, CLIPConfig, UserError
from methods.contrastive import contrastive_loss
from methods.finetune import Finetune, FinetuneSettings, trained_names
from methods.projection import Projection, ProjectionSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
LABELS = torch.tensor([0, 1, 0, 2, 0])  # of the five images


def numbers(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def log_softmax(row: np.ndarray) -> np.ndarray:
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def naive_loss(logits: np.ndarray, labels, plain: bool) -> float:
    """Image to text and text to image, one row after the other, and their mean."""
    terms = []
    for side in (logits, logits.T):
        for i, row in enumerate(side):
            right = [j for j in range(len(row)) if (i == j if plain else labels[i] == labels[j])]
            terms.append(-np.mean([log_softmax(row)[j] for j in right]))
    return np.mean(terms)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 0], [0, 1, 2, 3, 4], [1, 1, 1, 1, 1]], ids=str)
def test_the_loss_is_its_definition(labels, plain):
    logits = 5 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    found = contrastive_loss(logits, torch.tensor(labels), plain)
    assert found.item() == pytest.approx(naive_loss(numbers(logits), labels, plain), rel=1e-5)


def test_with_every_class_once_plain_and_same_class_pairs_are_clips_own_loss():
    logits = 5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6)
    own = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    for plain in (True, False):
        loss = contrastive_loss(logits, torch.tensor([3, 1, 2, 5, 4, 0]), plain)
        torch.testing.assert_close(loss, own)


def test_same_class_pairs_are_pulled_together_and_plain_ones_pushed_apart():
    for plain, sign in ((False, -1), (True, 1)):
        logits = torch.zeros(5, 5, requires_grad=True)
        contrastive_loss(logits, LABELS, plain).backward()
        assert logits.grad[0, 2].sign() == sign  # images 0 and 2 are of one class
        assert logits.grad[0, 1] > 0


# ------------------------------------------------------------------------------- projection heads


def projection(clip, **settings) -> Projection:
    torch.manual_seed(2)
    return Projection(clip, NAMES, TEMPLATE, ProjectionSettings(**settings))


@pytest.fixture
def features(new_clip, images):
    with torch.no_grad():
        return new_clip().encode_image(images)


def projected(method: Projection, features) -> tuple[np.ndarray, np.ndarray]:
    state = {name: numbers(tensor) for name, tensor in method.adapter_state().items()}
    x = {"image": unit(numbers(features)), "text": unit(numbers(method.class_features()))}
    for side in x:
        first, last = (
            (state[f"{side}_layers.{i}.weight"], state[f"{side}_layers.{i}.bias"]) for i in (0, 2)
        )
        hidden = x[side] @ first[0].T + first[1]
        hidden = np.maximum(hidden, 0) if method.settings.activation == "relu" else hidden
        x[side] = unit(hidden @ last[0].T + last[1])
    return x["image"], x["text"]


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("objective", ["class", "contrastive", "plain"])
def test_projection_logits_and_losses_are_the_formulas(objective, activation, new_clip, features):
    method = projection(
        new_clip(),
        activation=activation,
        objective="class" if objective == "class" else "contrastive",
        plain_pairs=objective == "plain",
    )
    with torch.no_grad():
        for parameter in method.adapter_state().values():
            parameter += 0.1 * torch.randn_like(parameter)
    image, text = projected(method, features)
    scale = np.exp(numbers(method.clip.logit_scale))
    logits = scale * image @ text.T
    np.testing.assert_allclose(numbers(method.classify(features)), logits, atol=1e-4)
    if objective == "class":
        loss = -np.mean([log_softmax(row)[k] for row, k in zip(logits, LABELS, strict=True)])
    else:
        pairs = scale * image @ text[LABELS.numpy()].T
        loss = naive_loss(pairs, LABELS.tolist(), objective == "plain")
    assert method.loss(features, LABELS).item() == pytest.approx(loss, rel=1e-4)


def test_projection_without_activation_starts_at_zero_shot(new_clip, features):
    clip = new_clip()
    zero_shot = ZeroShot.plain(clip, NAMES, TEMPLATE).classify(features)
    torch.testing.assert_close(projection(clip).classify(features), zero_shot)
    assert not torch.allclose(
        projection(clip, activation="relu").classify(features), zero_shot, atol=0.1
    )


# ------------------------------------------------------------------------------- full fine-tuning


def finetune(clip, **settings) -> Finetune:
    return Finetune(clip, NAMES, TEMPLATE, FinetuneSettings(**settings))


def expected_names(clip, part: str) -> set[str]:
    """By what each name says of its place."""
    every = dict(clip.named_parameters())
    if part == "both":
        return set(every)
    if part == "image":
        return {name for name in every if name.split(".")[0] == "visual"}
    if part == "text":
        return {name for name in every if name.split(".")[0] not in ("visual", "logit_scale")}
    chosen = {"text_projection", "visual.proj"}
    for name in every:
        parts = name.split(".")
        if "ln_final" in parts or "ln_post" in parts:
            chosen.add(name)
        if "resblocks" in parts and int(parts[parts.index("resblocks") + 1]) >= 2 - int(part[-1]):
            chosen.add(name)
    return chosen


@pytest.mark.parametrize("part", ["both", "image", "text", "last-1", "last-2"])
def test_a_step_changes_the_named_weights_and_no_others(part, new_clip, images):
    clip = new_clip()
    method = finetune(clip, train=part)
    names = expected_names(clip, part)
    assert set(trained_names(clip, part)) == names
    assert set(method.adapter_state()) == {f"clip.{name}" for name in names}
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    mine = dict(method.clip.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in before.items())
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    method.loss(method.encode(images), LABELS).backward()
    optimizer.step()
    assert {n for n, p in mine.items() if not torch.equal(p, before[n])} == names


def test_blocks_are_counted_from_the_end_of_each_tower():
    """Towers of different depth, and a block 1 beside blocks 10 and 11."""
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 12, 1, 64, 3, 1))
    blocks = {n.split(".mlp")[0] for n in trained_names(clip, "last-2") if "c_fc.weight" in n}
    assert blocks == {
        "visual.transformer.resblocks.10",
        "visual.transformer.resblocks.11",
        "transformer.resblocks.1",
        "transformer.resblocks.2",
    }
    with pytest.raises(UserError, match="last-1 to last-3"):  # of the shallower tower
        trained_names(clip, "last-4")


@pytest.mark.parametrize(
    "part", ["", "all", "images", "last", "last-", "last-0", "last-3", "last-x", "last--1", "2"]
)
def test_a_part_that_is_none_is_one_line_that_lists_them(part, new_clip):
    with pytest.raises(UserError, match=f"--train {part}: expected both, image, text, or last-1"):
        finetune(new_clip(), train=part)


@pytest.mark.parametrize("objective", ["class", "contrastive", "plain"])
def test_finetune_losses_are_the_formulas(objective, new_clip, images):
    clip = new_clip()
    method = finetune(
        clip,
        objective="class" if objective == "class" else "contrastive",
        plain_pairs=objective == "plain",
    )
    image, text = unit(numbers(clip.encode_image(images))), unit(numbers(method.text_features()))
    scale = np.exp(numbers(clip.logit_scale))
    if objective == "class":
        logits = scale * image @ text.T
        expected = -np.mean([log_softmax(row)[k] for row, k in zip(logits, LABELS, strict=True)])
    else:
        pairs = scale * image @ text[LABELS.numpy()].T
        expected = naive_loss(pairs, LABELS.tolist(), objective == "plain")
    assert method.loss(images, LABELS).item() == pytest.approx(expected, rel=1e-4)


def test_half_precision_weights_become_float32_masters(new_clip, images):
    clip = new_clip().half()
    half = {name: p.detach().clone() for name, p in clip.named_parameters()}
    method = finetune(clip)
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    mine = dict(method.clip.named_parameters())
    assert all(torch.equal(p, half[n].float()) for n, p in mine.items())
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-6)
    method.loss(images, LABELS).backward()
    optimizer.step()  # smaller than what float16 could add up
    assert any(not torch.equal(p, half[n].float()) for n, p in mine.items())


@pytest.mark.parametrize("objective", ["class", "contrastive"])
def test_at_learning_rate_0_finetune_is_zero_shot(objective, new_clip, images):
    zero_shot = ZeroShot.plain(new_clip(), NAMES, TEMPLATE)(images)
    method = finetune(new_clip(), objective=objective)
    optimizer = torch.optim.AdamW(method.adapter_state().values(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        method.loss(images, LABELS).backward()
        optimizer.step()
    with method.inference():
        torch.testing.assert_close(method(images), zero_shot)


def test_fine_tuning_keeps_the_temperature_below_clips_limit(new_clip, images):
    method = finetune(new_clip())
    with torch.no_grad():
        method.clip.logit_scale.fill_(9.0)  # e^9 = 8103
    method.loss(images, LABELS)
    assert method.clip.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)
