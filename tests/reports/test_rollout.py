"""Attention rollout, beside attention written out head by head and the paper's product."""

import copy

import pytest
import torch

from clip_min import CLIP, CLIPConfig
from methods import METHODS
from reports.rollout import flow, rollout

NAMES = ["rose", "tulip", "iris"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    made = CLIP(CLIPConfig(16, 32, 8, 32, 3, 4, 64, 1, 2)).eval()
    for block in made.visual.transformer.resblocks:  # so that attention is far from even
        block.attn.in_proj.weight.data *= 6
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(clip: CLIP, image: torch.Tensor) -> torch.Tensor:
    """One image (3, n, n) -> the class token's row of the paper's product, block by block."""
    tower, product = clip.visual, torch.eye(17)
    x = tower.embed(image[None])
    for block in tower.transformer.resblocks:
        y = block.ln_1(x)[0]  # (T, D)
        weights, biases = (p.chunk(3) for p in block.attn.in_proj.parameters())
        q, k, _ = (y @ w.T + b for w, b in zip(weights, biases, strict=True))  # (T, D)
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            scores = q[:, part] @ k[:, part].T / 8**0.5
            heads.append(scores.exp() / scores.exp().sum(1, keepdim=True))
        product = (sum(heads) / 4 + torch.eye(17)) / 2 @ product
        x = block(x)
    return product[0, 1:].view(4, 4)


def test_rollout_is_the_papers_product(clip, images):
    method = METHODS["zero_shot"].plain(clip, NAMES, "a {}.")
    with torch.no_grad():
        found, chosen = rollout(method, images)
        expected = torch.stack([by_hand(clip, image) for image in images])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(chosen, method(images).softmax(-1))
    assert not any(b._forward_hooks for b in method.clip.visual.transformer.resblocks)


def test_an_adapted_tower_looks_elsewhere_and_a_new_one_as_before(clip, images):
    settings = METHODS["lora"].Settings(image_rank=2, text_rank=2)
    method = METHODS["lora"](clip, NAMES, "a {}.", settings)
    before, _ = rollout(METHODS["zero_shot"].plain(clip, NAMES, "a {}."), images)
    torch.testing.assert_close(rollout(method, images)[0], before)  # B starts at 0
    for parameter in method.adapter_state().values():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(rollout(method, images)[0], before, rtol=1e-2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in METHODS), ("projection", {"head": "attention"})],
)
def test_every_method_has_a_rollout(name, settings, clip, images):
    kind = METHODS[name]
    if hasattr(kind.Settings, "image_rank"):
        settings = {"image_rank": 2, "text_rank": 2}
    method = kind(clip, NAMES, "a {}.", kind.Settings(**settings))
    found, chosen = rollout(method, images)
    assert (found.shape, chosen.shape) == ((2, 4, 4), (2, 3))
    total = found.sum((1, 2))
    assert ((total > 0) & (total < 1)).all()
    if name == "promptsrc":  # tokens of this method are replaced in each block
        assert (
            found.sum() < rollout(METHODS["zero_shot"].plain(clip, NAMES, "a {}."), images)[0].sum()
        )


@pytest.mark.parametrize("deep", [False, True])
def test_learned_tokens_hold_nothing_of_the_image_when_they_enter(clip, images, deep):
    settings = METHODS["vpt"].Settings(n_tokens=3, deep=deep, dropout=0.0)
    method = METHODS["vpt"](clip, NAMES, "a {}.", settings)
    found, _ = rollout(method, images)
    assert found.shape == (2, 4, 4)
    assert (found.sum((1, 2)) < 1).all()  # the rest is of learned tokens and of the class token


def test_replaced_tokens_pass_nothing_on():
    """Two blocks of a class token, one learned token and two patches: the learned token gathers
    from the patches alone, and the class token from the learned one alone.
    """
    gather = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]])[None]
    x, other = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    kept = flow([(gather, x, x), (gather, x, x)], patches=2)
    torch.testing.assert_close(kept, torch.tensor([[0.125, 0.125]]))  # 1/2 of 1/2, by halves
    replaced = copy.deepcopy(other)
    replaced[:, 1] = 1
    assert flow([(gather, x, x), (gather, replaced, x)], patches=2).tolist() == [[0, 0]]
