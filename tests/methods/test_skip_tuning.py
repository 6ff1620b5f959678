"""Skip Tuning beside a plain second writing of it on openai-clip's own modules."""

import pytest
import torch
import torch.nn.functional as F

from clip_min import CLIP, CLIPConfig, UserError, tokenize
from fewshot.loop import new_optimizer
from methods.finetune import Finetune
from tests.methods.published import openai_text_tower

NAMES = ["rose", "red tulip", "ox-eye daisy", "bird of paradise", "sweet pea", "fern", "iris"]
TEMPLATE = "a close-up photo of a {}."


@pytest.fixture
def clip() -> CLIP:
    """Three blocks in each tower, with heads as wide as openai-clip has them."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 3, 1, 64, 3, 1)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def new(clip, names=NAMES, **settings) -> Finetune:
    settings = {**Finetune.recipes["skip-tuning"], "train": "last-2", **settings}
    return Finetune(clip, names, TEMPLATE, Finetune.Settings(**settings))


def their_text(model, names=NAMES):
    return F.normalize(model.encode_text(tokenize([TEMPLATE.format(n) for n in names])), dim=-1)


def kept(similar, labels, count: int) -> list[int]:
    """Naively: the images' own classes, then the others by the most that any image is like them."""
    own = sorted({*labels.tolist()})
    others = [k for k in range(similar.shape[1]) if k not in own]
    others.sort(key=lambda k: -max(similar[:, k].tolist()))
    return sorted([*own, *others][: max(count, len(own))])


@pytest.mark.parametrize(
    ("share", "labels", "count"),
    [
        (0.5, [0, 4, 2, 4], 4),  # ceil(3.5)
        (0.2, [0, 1, 2, 3], 2),  # fewer than the batch has
        (0.0, [5, 5, 5, 5], 2),  # among one class the loss would be 0
        (0.9, [6, 0, 6, 0], 7),
    ],
)
def test_steps_are_those_of_the_second_writing(share, labels, count, clip, images):
    """Which classes, logits, loss, gradients of three steps of SGD, and where these end."""
    ours, theirs, labels = (
        new(clip, class_share=share),
        openai_text_tower(clip),
        torch.tensor(labels),
    )
    images = images[:4]
    prototypes = their_text(theirs)
    learned = {"": [], "visual.": []}  # those of the text and of the image tower
    for name, p in theirs.named_parameters():
        last = any(f"resblocks.{i}." in name for i in (1, 2))
        if last or name.split(".")[-1] in ("proj", "text_projection"):
            learned["visual." if name.startswith("visual") else ""].append(p.requires_grad_())
    for norm in (theirs.ln_final, theirs.visual.ln_post):
        side = "visual." if norm is theirs.visual.ln_post else ""
        learned[side] += [p.requires_grad_() for p in norm.parameters()]
    groups = [{"params": learned[""], "lr": 0.02}, {"params": learned["visual."], "lr": 0.005}]
    their_sgd = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    trained = ours.adapter_state()
    our_sgd = new_optimizer(ours.settings, trained, (), ours.lr_factors)
    for group in our_sgd.param_groups:
        group["lr"] = 0.02 * group["factor"]
    before = {n: t.detach().clone() for n, t in trained.items()}
    for step in range(3):
        pixels = images.roll(step, dims=-1)
        f = F.normalize(theirs.encode_image(pixels), dim=-1)
        similar = f.detach() @ prototypes.T
        chosen = kept(similar, labels, count)
        x = ours.encode(pixels)
        assert x.shape == (4, 17, 64)  # tokens before the first block that learns
        assert ours.most_similar(ours.image_features(x), labels).tolist() == chosen
        text = their_text(theirs, [NAMES[k] for k in chosen])
        targets = torch.tensor([chosen.index(k) for k in labels.tolist()])
        expected = F.cross_entropy(theirs.logit_scale.exp() * f @ text.T, targets)
        loss = ours.loss(x, labels)
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
        for optimizer, value in ((our_sgd, loss), (their_sgd, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    names = {n.replace("in_proj_", "in_proj."): p for n, p in theirs.named_parameters()}
    assert len(trained) == sum(map(len, learned.values()))
    for name, mine in trained.items():
        other = names[name.removeprefix("clip.")]
        way = (other - before[name]).abs().max()
        assert (mine - other).abs().max() <= 1e-2 * way + 1e-6, name
        assert way > 0 or expected < 1e-6


def test_at_most_50_classes_and_only_where_a_share_is_asked_for(clip, images):
    many = [f"{i} times {name}" for i in range(20) for name in NAMES]
    labels = torch.tensor([139, 0, 70, 3])
    method = new(clip, many)
    chosen = method.most_similar(method.image_features(method.encode(images[:4])), labels)
    assert len(chosen) == 50
    assert {*labels.tolist()} <= {*chosen.tolist()}
    whole = new(clip, many, class_share=1.0)
    x = whole.encode(images[:4])
    torch.testing.assert_close(whole.loss(x, labels), F.cross_entropy(whole.classify(x), labels))


def test_texts_of_other_classes_are_not_computed(clip, images, monkeypatch):
    method, seen = new(clip), []
    real = type(method).text_features

    def watched(self):
        seen.append(len(self.classnames))
        return real(self)

    monkeypatch.setattr(type(method), "text_features", watched)
    method.loss(method.encode(images[:4]), torch.tensor([0, 0, 1, 1]))
    assert seen == [4]


def test_a_share_of_classes_is_not_for_pairs():
    with pytest.raises(UserError, match=r"--class-share 0\.5: .*--objective class"):
        Finetune.Settings(objective="contrastive", class_share=0.5)
    with pytest.raises(UserError, match=r"--class-share 1\.5: expected 0 to 1"):
        Finetune.Settings(class_share=1.5)


def test_the_recipe_learns_what_the_paper_says():
    """ViT-B/16: of both towers blocks 6-11, the last LayerNorm and the projection."""
    clip = CLIP(CLIPConfig(512, 32, 16, 768, 12, 12, 512, 12, 8))
    method = Finetune(clip, ["a"], "{}", Finetune.Settings(**Finetune.recipes["skip-tuning"]))
    counted = sum(p.numel() for p in method.adapter_state().values())
    blocks = sum(12 * d * d + 13 * d for d in (768, 512))  # of one block of each
    assert counted == 6 * blocks + 2 * (768 + 512) + (768 + 512) * 512
    assert method.first_block == 6
