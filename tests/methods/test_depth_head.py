"""DePT's head beside a plain second writing of it, on CoOp, KgCoOp and CLIP-Adapter."""

import pytest
import torch

from clip_min import CLIP, CLIPConfig
from methods import METHODS

NAMES = ["rose", "red tulip", "ox-eye daisy", "fern"]
NOVEL = ["sweet pea", "moon orchid", "iris"]
TEMPLATE = "a photo of a {}."
LABELS = torch.tensor([0, 3, 2, 2, 1])

beside = pytest.mark.parametrize("name", ["coop", "kgcoop", "clip_adapter"])


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 64, 1, 1, 64, 2, 1)).eval()


def new(name: str, clip, moved: bool = True, **settings):
    """With all that it learns away from where it starts."""
    torch.manual_seed(1)
    kind = METHODS[name]
    method = kind(clip, NAMES, TEMPLATE, kind.Settings(**{"depth_head": True} | settings))
    with torch.no_grad():
        for tensor in method.adapter_state().values() if moved else ():
            tensor += 0.1 * torch.randn_like(tensor)
    return method


def features(count: int = 5):
    return 3 * torch.randn(count, 32, generator=torch.Generator().manual_seed(2))


def published(method, x, labels=None, weights=(1, 1, 1, 1)):
    """logits of sim and lin, and where labels are given the loss, written down from the paper.

    weights: of each class, in a weighted mean over images and over texts.
    """
    head, s = method.head, method.clip.logit_scale.exp()
    f, text = method.features(x)
    sim = torch.stack([s * torch.cosine_similarity(row[None], text) for row in f])

    def linear(x, part):
        return (x * part.scale + part.shift) @ head["linear"].weight.T + head["linear"].bias

    lin = linear(f, head["image"])
    if labels is None:
        return sim, lin
    texts = linear(torch.stack([text[k] for k in labels.tolist()]), head["text"])

    def loss_of(logits, of):
        each = [-row[k] * weights[k] for row, k in zip(logits.log_softmax(1), of, strict=True)]
        return sum(each) / sum(weights[k] for k in of)

    of = labels.tolist()
    return 0.3 * loss_of(sim, of) + 0.7 * loss_of(torch.cat([lin, texts]), of + of)


@beside
@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 1.0, 2.0]])
def test_loss_and_gradients_are_those_of_the_second_writing(weights, name, clip):
    """weights: of classes, for --balance."""
    method, x = new(name, clip), features()
    method.class_weights = None if weights is None else torch.tensor(weights)
    expected = published(method, x, LABELS, weights or [1.0] * 4)
    loss = method.loss(x, LABELS)
    if name == "kgcoop":
        text, written = method.text_features(), method.written_features()
        expected = expected + 8.0 * (1 - torch.cosine_similarity(text, written).mean())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    learned = dict(method.named_parameters())
    mine, theirs = (
        torch.autograd.grad(value, [learned[n] for n in method.adapter_state()])
        for value in (loss, expected)
    )
    for n, a, b in zip(method.adapter_state(), mine, theirs, strict=True):
        assert b.abs().max() > 0, n
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), n


@beside
def test_learned_names_by_both_and_others_by_similarity_alone(name, clip):
    method, x = new(name, clip), features()
    with torch.no_grad():
        sim, lin = published(method, x)
        both = 0.3 * sim + 0.7 * lin
        found = method.classify(x)
        assert torch.equal(found.argmax(1), both.argmax(1))
        torch.testing.assert_close(found.softmax(1), both.softmax(1), atol=1e-5, rtol=1e-4)
        other = method.for_classes(NOVEL)
        torch.testing.assert_close(other.classify(x), published(other, x)[0], atol=1e-4, rtol=1e-4)


@beside
def test_in_one_list_similarity_says_which_kind_and_both_which_of_the_learned(name, clip):
    method, x = new(name, clip), features(20)
    names = [NOVEL[0], NAMES[2], NAMES[0], NOVEL[2], NAMES[3]]  # not all, in another order
    of = [2, 0, 3]
    with torch.no_grad():
        mixed = method.for_classes(names)
        p, sim = mixed.classify(x).softmax(1), published(mixed, x)[0]
        within = (0.3 * sim[:, [1, 2, 4]] + 0.7 * published(method, x)[1][:, of]).softmax(1)
    p_sim = sim.softmax(1)
    learned = p_sim[:, [1, 2, 4]].sum(dim=1, keepdim=True)
    torch.testing.assert_close(p[:, [0, 3]], p_sim[:, [0, 3]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(p[:, [1, 2, 4]], learned * within, atol=1e-5, rtol=1e-4)


@beside
def test_without_the_head_nothing_is_other_than_before(name, clip):
    method, x = new(name, clip, depth_head=False), features()
    assert not any("head" in n for n in method.adapter_state())
    assert method.lr_factors == {}
    f, text = method.features(x)
    assert torch.equal(method.classify(x), clip.logits(f, text))


@beside
def test_the_head_starts_at_random_and_its_scales_at_nothing(name, clip):
    method = new(name, clip, moved=False)
    state = method.adapter_state()
    heads = {n for n in state if n.startswith("head.")}
    parts = {f"head.{side}.{part}" for side in ("image", "text") for part in ("scale", "shift")}
    assert heads == {*parts, "head.linear.weight", "head.linear.bias"}
    assert method.lr_factors == dict.fromkeys(heads, 6.5)
    x = features()
    for side in ("image", "text"):
        assert torch.equal(method.head[side](x), x)
    weight = state["head.linear.weight"]
    assert weight.abs().max() <= 32**-0.5  # as nn.Linear starts: even between these
    assert weight.std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)


def test_the_recipe_is_that_of_its_authors():
    s = METHODS["kgcoop"].Settings(**METHODS["kgcoop"].recipes["dept"])
    assert (s.near, s.depth_head, s.batch_size, s.epochs, s.lr) == (2.0, True, 4, 10, 3.5e-3)
