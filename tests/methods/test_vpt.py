"""VPT against a forward pass put together by hand, token by token, from openai-clip's modules."""

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F
from published import openai_text_tower
from torch import Tensor

from clip_min import CLIP, CLIPConfig, UserError
from methods.vpt import VPT, VPTSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
DEPTH, WIDTH, PATCH = 3, 128, 8


@pytest.fixture(scope="module")
def clip():
    """Small, but with heads 64 wide, as openai-clip wants them."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, PATCH, WIDTH, DEPTH, 2, 64, 1, 1)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def vpt(clip, **settings) -> VPT:
    torch.manual_seed(2)
    return VPT(clip, NAMES, TEMPLATE, VPTSettings(**settings)).eval()


def class_token(visual, images: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    """openai-clip's tower; prompts: block -> (N, D), put in before it, in place of earlier ones."""
    patches = visual.conv1(images).flatten(2).permute(0, 2, 1)  # (B, patches, D)
    tokens = [visual.class_embedding.expand(len(images), -1), *patches.unbind(1)]
    tokens = [t + p for t, p in zip(tokens, visual.positional_embedding, strict=True)]
    tokens = [visual.ln_pre(t) for t in tokens]  # each (B, D)
    within = 0  # prompts among them
    for i, block in enumerate(visual.transformer.resblocks):
        if i in prompts:
            mine = [p.expand(len(images), -1) for p in prompts[i]]
            tokens = [tokens[0], *mine, *tokens[1 + within :]]
            within = len(mine)
        tokens = list(block(torch.stack(tokens)).unbind(0))  # (T, B, D)
    return visual.ln_post(tokens[0])


def by_hand(method: VPT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the prompts (places, N, D) that they depend on."""
    theirs = openai_text_tower(method.clip)
    prompts = method.visual_prompts.detach().clone().requires_grad_()
    first = method.settings.first_block
    x = class_token(theirs.visual, images, {first + i: p for i, p in enumerate(prompts)})
    if method.head is not None:
        return x @ method.head.weight.T + method.head.bias, prompts
    text = theirs.encode_text(openai_clip.tokenize([TEMPLATE.format(n) for n in NAMES]))
    cosine = F.normalize(x @ theirs.visual.proj, dim=-1) @ F.normalize(text, dim=-1).T
    return theirs.logit_scale.exp() * cosine, prompts


@pytest.mark.parametrize("head", ["text", "linear"])
@pytest.mark.parametrize(
    ("n_tokens", "deep", "first_block"),
    [(1, False, 0), (5, False, 0), (3, False, 2), (1, True, 0), (4, True, 0), (2, True, 1)],
)
def test_logits_and_gradients_are_those_of_openai_clips_modules(
    n_tokens, deep, first_block, head, clip, images
):
    method = vpt(clip, n_tokens=n_tokens, deep=deep, first_block=first_block, head=head)
    assert method.visual_prompts.shape == (DEPTH - first_block if deep else 1, n_tokens, WIDTH)
    mine, (theirs, prompts) = method(images), by_hand(method, images)
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    labels = torch.tensor([0, 1, 2, 0, 1])
    F.cross_entropy(mine, labels).backward()
    F.cross_entropy(theirs, labels).backward()
    found, expected = method.visual_prompts.grad, prompts.grad
    assert expected.flatten(1).abs().amax(dim=1).min() > 0  # those of every block matter
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("deep", [False, True])
def test_no_tokens_are_zero_shot(deep, clip, images):
    method = vpt(clip, n_tokens=0, deep=deep)
    zero_shot = ZeroShot.plain(clip, NAMES, TEMPLATE)(images)
    torch.testing.assert_close(method(images), zero_shot)


def test_dropout_is_of_the_prompts_in_training_alone(clip, images):
    method = vpt(clip, n_tokens=20, dropout=0.5, deep=True)
    calm = method(images)
    assert torch.equal(calm, method(images))
    method.train()
    torch.manual_seed(0)
    wild = method(images)
    assert not torch.equal(wild, method(images))
    with method.inference():
        assert torch.equal(method(images), calm)
    assert torch.equal(vpt(clip, n_tokens=20, dropout=0.0, deep=True).train()(images), calm)
    torch.manual_seed(0)
    assert torch.equal(method(images), wild)


def test_every_image_of_a_batch_has_dropout_of_its_own(clip, images):
    method = vpt(clip, n_tokens=20, dropout=0.5).train()
    logits = method(images[:1].expand(4, -1, -1, -1))
    assert len({tuple(row.tolist()) for row in logits}) == 4


def test_dropout_1_is_prompts_of_zeros(clip, images):
    dropped, zeros = vpt(clip, dropout=1.0).train(), vpt(clip, dropout=0.0)
    torch.nn.init.zeros_(zeros.visual_prompts)
    torch.testing.assert_close(dropped(images), zeros(images))


def test_prompts_start_uniform_between_the_published_bounds(clip):
    """±√(6 / (3p² + D)), whose standard deviation is the bound over √3."""
    prompts = vpt(clip, n_tokens=200, deep=True).visual_prompts.detach()
    bound = (6 / (3 * PATCH**2 + WIDTH)) ** 0.5
    assert prompts.abs().max() <= bound
    assert prompts.max() > 0.999 * bound
    assert prompts.min() < -0.999 * bound
    assert prompts.mean().abs() < 0.01 * bound
    assert prompts.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_the_linear_head_knows_its_own_classes_alone(clip):
    method = vpt(clip, head="linear")
    assert set(method.adapter_state()) == {"visual_prompts", "head.weight", "head.bias"}
    assert method.head.weight.shape == (3, WIDTH)
    assert method.head.weight.std().item() == pytest.approx((2 / 3) ** 0.5, rel=0.15)  # fan-out
    assert method.head.bias.tolist() == [0, 0, 0]  # theirs: all -log 99, the same for a softmax
    assert method.no_weight_decay == ("head.bias",)
    with pytest.raises(UserError, match="cannot name classes"):
        method.for_classes(["sweet pea"])
    with pytest.raises(UserError, match="or just some of its own"):
        method.for_classes(method.classnames[:2])
    assert method.for_classes(method.classnames).classnames == method.classnames
    assert vpt(clip).for_classes(["sweet pea"]).classnames == ["sweet pea"]


def test_the_paper_recipe_is_that_of_its_code():
    """configs/base-prompt.yaml, tune_fgvc.py, src/data/transforms.py, src/engine/trainer.py and
    demo.ipynb (50 tokens) of its repository.
    """
    s = VPTSettings(**VPT.recipes["paper"])
    assert (s.optimizer, s.head, s.augment, s.keep) == ("sgd", "linear", "random-crop", "last")
    assert (s.n_tokens, s.deep, s.dropout, s.batch_size) == (50, False, 0, 128)
    assert (s.epochs, s.warmup_epochs, s.warmup, s.warmup_lr) == (100, 10, "linear", 0)
    assert (s.schedule, s.patience, s.min_lr) == ("epoch", 0, 0)
    points = VPTSettings(**VPT.recipes["paper-grid"]).points()
    lrs, decays = (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1), (0.01, 1e-3, 1e-4, 0)
    grid = [(p["lr"] * 256 / s.batch_size, p["weight_decay"]) for p in points]
    assert grid == [(lr, decay) for lr in lrs for decay in decays]
    assert {"lr": s.lr, "weight_decay": s.weight_decay} in points


def test_a_first_block_past_the_last_is_an_error(clip):
    with pytest.raises(UserError, match="--first-block 3: expected 0 to 2"):
        vpt(clip, first_block=3)


def test_parameter_counts_are_the_published_ones():
    """ViT-B/16 with 50 tokens: 38,400 shallow and 460,800 deep."""
    clip = CLIP(CLIPConfig(512, 32, 16, 768, 12, 12, 64, 1, 1))
    counts = [vpt(clip, n_tokens=50, deep=deep).visual_prompts.numel() for deep in (False, True)]
    assert counts == [38_400, 460_800]
