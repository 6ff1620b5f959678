"""ProLIP beside a plain second writing of it: openai-clip's own towers, Adam and torch's cosine."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_min import CLIP, CLIPConfig, normalize, tokenize
from fewshot.batches import Batches
from fewshot.loop import descend
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from methods.interop.plain_weights import merged_clip
from methods.prolip import ProLIP
from methods.zero_shot import ZeroShot
from tests.methods.published import openai_text_tower

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."


@pytest.fixture
def clip() -> CLIP:
    """Tiny, with heads as wide as openai-clip has them."""
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 64, 2, 1, 64, 2, 1)).eval()


@pytest.fixture
def theirs(clip) -> nn.Module:
    """openai-clip's model, of which the projection alone learns."""
    model = openai_text_tower(clip)
    model.visual.proj.requires_grad_()
    return model


def new(clip, recipe: str = "default", **settings) -> ProLIP:
    return ProLIP(clip, NAMES, TEMPLATE, ProLIP.Settings(**{**ProLIP.recipes[recipe], **settings}))


def their_logits(model, images):
    image = F.normalize(model.visual(images), dim=-1)
    text = F.normalize(model.encode_text(tokenize([TEMPLATE.format(n) for n in NAMES])), dim=-1)
    return model.logit_scale.exp() * image @ text.T


@pytest.mark.parametrize("penalty", [0.0, 0.25, 7.0])
def test_logits_loss_and_gradient_are_those_of_the_second_writing(penalty, clip, theirs, images):
    method, labels, start = new(clip), torch.tensor([0, 1, 2, 2, 0]), theirs.visual.proj.clone()
    method.penalty = penalty
    shift = 0.01 * torch.randn(start.shape, generator=torch.manual_seed(3))
    with torch.no_grad():
        method.clip.visual.proj += shift
        theirs.visual.proj += shift
    z = method.encode(images)
    assert z.shape == (5, 64)  # before the projection
    logits = their_logits(theirs, images)
    torch.testing.assert_close(method.classify(z), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method(images), logits, atol=1e-4, rtol=1e-4)
    held = nn.MSELoss(reduction="sum")(start.detach(), theirs.visual.proj)
    expected = F.cross_entropy(logits, labels) + penalty * held
    loss = method.loss(z, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    found = method.clip.visual.proj.grad
    torch.testing.assert_close(found, theirs.visual.proj.grad, atol=1e-5, rtol=1e-3)


def test_steps_are_adams_on_all_images_along_torchs_cosine(clip, theirs, tmp_path):
    """Two images of each class at most, so λ = 1/2."""
    pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.manual_seed(4)).byte()
    labels = torch.tensor([0, 1, 2, 2, 0])
    train = Batches(Pictures(pixels, labels), pixels, Reader(32, folder=None))
    method = new(clip, "paper", augment="none", epochs=7, lr=1e-3)
    config = ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"]
    run = Run.start(tmp_path / "run", dict.fromkeys(config, "x"))
    method.fit(train, train, lambda *given: descend(*given, run=run, seed=1))
    assert method.penalty == 0.5

    start = theirs.visual.proj.detach().clone()
    optimizer = torch.optim.Adam([theirs.visual.proj], lr=1e-3, eps=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for _ in range(7):
        held = (theirs.visual.proj - start).square().sum()
        loss = F.cross_entropy(their_logits(theirs, normalize(pixels)), labels) + held / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    moved = theirs.visual.proj.detach() - start
    assert moved.abs().max() > 2e-3
    found = method.clip.visual.proj.detach() - start
    torch.testing.assert_close(found, moved, atol=2e-5, rtol=1e-2)


def test_lambda_is_one_over_the_shots_or_what_is_asked_for(clip):
    for asked, found in ((-1.0, 0.25), (0.0, 0.0), (3.0, 3.0)):
        method = new(clip, penalty=asked)
        method.fit(SimpleNamespace(shots=4), None, descend=lambda *_: None)
        assert method.penalty == found


def test_at_the_start_and_held_without_end_it_is_zero_shot(clip, images):
    method, plain = new(clip), ZeroShot.plain(clip, NAMES, TEMPLATE)
    assert torch.equal(method(images), plain(images))
    x, labels = method.encode(images), torch.tensor([0, 1, 2, 2, 0])
    distances = []
    for method.penalty in (0.0, 1e2, 1e4, 1e6):
        method.load_adapter({"clip.visual.proj": clip.visual.proj.detach()})
        optimizer = torch.optim.SGD([method.clip.visual.proj], lr=0.1 / (1 + 2 * method.penalty))
        for _ in range(300):
            optimizer.zero_grad()
            method.loss(x, labels).backward()
            optimizer.step()
        distances.append((method.classify(x) - plain(images)).abs().max().item())
    assert distances[0] > 0.1
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


def test_the_projection_alone_learns_and_merges_into_a_plain_clip(clip, images):
    method = new(clip)
    (name,) = method.adapter_state()
    learned = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert (name, learned) == ("clip.visual.proj", 64 * 32)  # D·E
    with torch.no_grad():
        method.clip.visual.proj.mul_(-2)
    before = method(images)
    merged = merged_clip(method)(images, tokenize([TEMPLATE.format(name) for name in NAMES]))
    torch.testing.assert_close(merged, before)


def test_what_is_kept_of_images_is_not_taken_for_their_features(clip, images):
    plain, one, other = ZeroShot.plain(clip, NAMES, TEMPLATE), new(clip), new(clip)
    with torch.no_grad():
        other.clip.visual.proj.mul_(3)  # which does not change what is encoded
    assert one.encoder == other.encoder != plain.encoder
    assert torch.equal(one.encode(images), other.encode(images))
