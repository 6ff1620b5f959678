"""PromptSRC against its paper written down plainly, on openai-clip's modules: every class a prompt
of 77 tokens, image tokens behind the patches, frozen features from a second, untouched model.
"""

import clip as openai_clip
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from published import PublishedCoOp, openai_text_tower
from torch import Tensor, nn

from clip_min import CLIP, CLIPConfig, UserError
from methods.promptsrc import PromptSRC, PromptSRCSettings
from methods.templates import ENSEMBLE
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red rose", "hard-leaved pocket orchid", "love in the mist", "x", "..."]
MANY = [f"{i} times {name}" for i in range(12) for name in NAMES]  # several chunks of a tree
TEMPLATE = "a photo of a {}."
WRITTEN = ("a photo of a {}.", "a drawing of one {}, a flower.", "{}")


@pytest.fixture(scope="module")
def clip():
    """Small, but with heads 64 wide, as openai-clip wants them, and three blocks in each tower."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 128, 3, 2, 64, 4, 1)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def promptsrc(clip, names=NAMES, **settings) -> PromptSRC:
    """With tokens large enough to matter."""
    torch.manual_seed(2)
    method = PromptSRC(
        clip, names, TEMPLATE, PromptSRCSettings(**{"templates": WRITTEN} | settings)
    )
    with torch.no_grad():
        for tensor in method.adapter_state().values():
            tensor += 0.2 * torch.randn_like(tensor)
    return method


class Published(PublishedCoOp):
    """text, image: lists of the learned tokens before each block, (M, D) and (N, D)."""

    def __init__(self, ours: PromptSRC):
        mine = ours.adapter_state()
        super().__init__(openai_text_tower(ours.lent[0]), ours.classnames, copy(mine["context"]))
        self.image_tokens = nn.ParameterList([copy(mine["visual_context"])])
        self.text_tokens = nn.ParameterList([self.context])
        for i in range(1, 12):
            name = f"transformer.resblocks.{i}.prompts"
            if f"clip.{name}" in mine:
                self.text_tokens.append(copy(mine[f"clip.{name}"]))
            if f"clip.visual.{name}" in mine:
                self.image_tokens.append(copy(mine[f"clip.visual.{name}"]))
        self.settings = ours.settings
        means = []
        for name in ours.classnames:
            tokens = openai_clip.tokenize([t.replace("{}", name) for t in WRITTEN])
            means.append(self.text.encode_text(tokens).mean(0))  # not normalised before
        self.frozen_text = F.normalize(torch.stack(means), dim=-1)

    def encode(self, context: Tensor) -> Tensor:
        x = self.prompts(context.expand(len(self.rest), -1, -1)) + self.text.positional_embedding
        for i, block in enumerate(self.text.transformer.resblocks):
            if 0 < i < len(self.text_tokens):
                tokens = self.text_tokens[i].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], tokens, x[:, 1 + tokens.shape[1] :]], dim=1)
            x = block(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.text.ln_final(x)
        return x[torch.arange(len(x)), self.ends] @ self.text.text_projection

    def encode_images(self, images: Tensor) -> Tensor:
        tower, count = self.text.visual, len(self.image_tokens[0])
        x = tower.conv1(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + tower.positional_embedding
        own = x.shape[1]
        x = torch.cat([x, self.image_tokens[0].expand(len(x), -1, -1)], dim=1)
        x = tower.ln_pre(x)
        for i, block in enumerate(tower.transformer.resblocks):
            if 0 < i < len(self.image_tokens):
                x = torch.cat([x[:, :own], self.image_tokens[i].expand(len(x), -1, -1)], dim=1)
            assert x.shape[1] == own + count
            x = block(x.permute(1, 0, 2)).permute(1, 0, 2)
        return tower.ln_post(x[:, 0]) @ tower.proj

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.encode_images(images))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        s, scale = self.settings, self.text.logit_scale.exp()
        text = F.normalize(self.encode(self.context), dim=-1)
        image = F.normalize(self.encode_images(images), dim=-1)
        frozen = F.normalize(self.text.encode_image(images), dim=-1)
        p = (scale * image @ text.T).softmax(dim=1)
        q = (scale * frozen @ self.frozen_text.T).softmax(dim=1)
        return (
            -p[torch.arange(len(p)), labels].log().mean()
            + s.near_text * (text - self.frozen_text).abs().mean()
            + s.near_image * (image - frozen).abs().mean()
            + s.near_logits * (q * (q / p).log()).sum() / p.numel()
        )


def copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def pairs(ours: PromptSRC, theirs: Published) -> list[tuple[Tensor, Tensor]]:
    """Each learned tensor of ours, beside theirs."""
    texts = [ours.context, *(b.prompts for b in ours.clip.transformer.resblocks if prompted(b))]
    images = [b.prompts for b in ours.clip.visual.transformer.resblocks if prompted(b)]
    others = [*theirs.text_tokens, *theirs.image_tokens]
    assert len(others) == len(ours.adapter_state())
    return list(zip([*texts, ours.visual_context, *images], others, strict=True))


def prompted(block: nn.Module) -> bool:
    return hasattr(block, "prompts")


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (NAMES, {}),
        (NAMES, {"depth": 1}),
        (NAMES, {"depth": 2, "n_visual": 1}),
        (NAMES, {"n_ctx": 2, "ctx_init": "", "n_visual": 7}),
        (MANY, {}),
        (NAMES, {"near_text": 0.0, "near_image": 0.0}),  # so that the divergence counts alone
    ],
)
def test_training_is_the_papers_on_openai_clips_modules(names, changes, clip, images):
    """Logits, loss and gradients, in each of three steps of SGD, and where these end."""
    ours = promptsrc(clip, names, **changes)
    theirs = Published(ours)
    both = pairs(ours, theirs)
    start = [p.detach().clone() for p, _ in both]
    optimizers = [
        torch.optim.SGD(tensors, lr=2.5e-3, momentum=0.9) for tensors in zip(*both, strict=True)
    ]
    for step in range(3):
        x, labels = images.roll(step, dims=-1), torch.tensor([0, 1, 2, 3, 4])
        mine, other = ours(x), theirs(x)
        assert (mine - other).abs().max() < 1e-4 * other.abs().max()
        losses = ours.loss(ours.encode(x), labels), theirs.loss(x, labels)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for p, q in both:
            assert q.grad.abs().max() > 0
            assert (p.grad - q.grad).abs().max() < 1e-3 * q.grad.abs().max()
        for optimizer in optimizers:
            optimizer.step()
    for (p, q), before in zip(both, start, strict=True):
        assert (p - q).abs().max() < 1e-3 * (q - before).abs().max()


def test_the_cost_in_tokens_is_that_of_coop(clip):
    """[start] and the learned tokens stand once in a chunk, not once a class."""
    tree = promptsrc(clip, MANY).prompts
    assert len(tree.chunks) > 1
    for chunk in tree.chunks:
        own = len(chunk.tokens)
        assert chunk.rows[:6].tolist() == [0, own, own + 1, own + 2, own + 3, 5]
        assert (chunk.rows >= own).sum() == 4


def test_no_image_tokens_and_the_templates_own_words_are_zero_shot(clip, images):
    settings = PromptSRCSettings(depth=1, n_visual=0, templates=(TEMPLATE,))
    method, zero_shot = (
        PromptSRC(clip, NAMES, TEMPLATE, settings),
        ZeroShot.plain(clip, NAMES, TEMPLATE),
    )
    torch.testing.assert_close(method(images), zero_shot(images))
    labels = torch.tensor([0, 1, 2, 3, 4])
    cross_entropy = zero_shot.loss(zero_shot.encode(images), labels)
    torch.testing.assert_close(method.loss(images, labels), cross_entropy, rtol=1e-4, atol=1e-4)


def test_tokens_start_from_the_words_and_at_random(clip):
    torch.manual_seed(2)
    method = PromptSRC(clip, NAMES, TEMPLATE, PromptSRCSettings(n_visual=400))
    words = clip.token_embedding(openai_clip.tokenize("a photo of a")[0, 1:5])
    assert torch.equal(method.context, words)
    for name, tensor in method.adapter_state().items():
        if name != "context" and tensor.shape[0] == 400:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.02)
            assert tensor.mean().abs() < 5e-4
    assert method.templates == ENSEMBLE


def test_the_mean_is_the_published_gaussian_of_20_epochs(clip):
    method = promptsrc(clip, **PromptSRC.recipes["paper"])
    epochs = np.arange(1, 21)
    expected = scipy.stats.norm.pdf(epochs, 15, 1)
    mine = np.array([method.round_weight(epoch / 20) for epoch in epochs])
    np.testing.assert_allclose(mine / mine.sum(), expected / expected.sum(), rtol=1e-9)
    few = promptsrc(clip, **PromptSRC.recipes["few-shot"])
    epochs = np.arange(1, 51)
    expected = scipy.stats.norm.pdf(epochs, 45, 5)
    mine = np.array([few.round_weight(epoch / 50) for epoch in epochs])
    np.testing.assert_allclose(mine / mine.sum(), expected / expected.sum(), rtol=1e-9)


def test_the_recipes_are_the_published_ones():
    """Weights 25, 10 and 1; four tokens in nine blocks of each tower; 20 epochs, few-shot 50."""
    for name, epochs in (("paper", 20), ("few-shot", 50)):
        s = PromptSRCSettings(**PromptSRC.recipes[name])
        assert (s.near_text, s.near_image, s.near_logits) == (25, 10, 1)
        assert (s.depth, s.n_ctx, s.n_visual, s.ctx_init) == (9, 4, 4, "a photo of a")
        assert (s.epochs, s.lr, s.batch_size, s.keep) == (epochs, 2.5e-3, 4, "mean")


def test_parameter_counts_are_the_published_ones():
    """ViT-B/16: 46,080 learned numbers, whatever the classes."""
    clip = CLIP(CLIPConfig(512, 32, 16, 768, 12, 12, 512, 12, 8, vocab_size=49408))
    method = PromptSRC(clip, NAMES, TEMPLATE, PromptSRCSettings())
    assert sum(p.numel() for p in method.adapter_state().values()) == 46_080


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 0}, "--depth 0: expected 1 or more"),
        ({"n_visual": -1}, "--n-visual -1: expected 0 or more"),
        ({"near_text": -1.0}, "--near-text -1.0: expected"),
        ({"mean_width": 0.0}, "--mean-width 0.0: expected 0.03 or more"),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_its_flag(changes, said):
    with pytest.raises(UserError, match=said):
        PromptSRCSettings(**changes)
