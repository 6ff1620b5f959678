"""The model computes what OpenAI's code computes, forward and backward, from the same weights."""

import clip.model
import open_clip
import pytest
import torch
import torch.nn.functional as F
from oracle import SMALL, far, gradients, openai_clip, random_tokens, renamed, same_in_ours
from torch import nn

from clip_min import CLIP, CONFIGS
from clip_min.model import Attention, Block, QuickGELU, Transformer

pytestmark = pytest.mark.usefixtures("both_ways")

SIZES = {"small": SMALL, "demo": CONFIGS["demo"], "ViT-B/16": CONFIGS["ViT-B/16"]}
CLOSE = 1e-5


@pytest.mark.parametrize(
    ("size", "threads"), [("small", 1), ("demo", 1), ("ViT-B/16", 1), ("ViT-B/16", 2)]
)
@torch.no_grad()
def test_features_and_logits_equal_openais(size, threads, request):
    """With two threads, large products may run in another library (clip_min/fast.py)."""
    if threads == 2:
        request.getfixturevalue("zen5")
    config = SIZES[size]
    theirs = openai_clip(config)
    ours = same_in_ours(theirs, config)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    tokens = random_tokens(5, config)
    assert far(ours.encode_image(images), theirs.encode_image(images)) < CLOSE
    assert far(ours.encode_text(tokens), theirs.encode_text(tokens)) < CLOSE
    assert far(ours(images, tokens), theirs(images, tokens)[0]) < CLOSE


@pytest.mark.parametrize(
    ("size", "dtype", "close"),
    [
        ("small", torch.float32, CLOSE),
        # In float32 OpenAI's own gradients of larger models, and of the logit scale, are further
        # than 1e-5 from the truth: their terms cancel. Float64 leaves only real differences.
        ("small", torch.float64, 1e-10),
        ("demo", torch.float64, 1e-10),
        pytest.param("ViT-B/16", torch.float64, 1e-10, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_every_parameter_equals_openais(size, dtype, close, monkeypatch):
    """The loss is the cross-entropy of the logits of three images and five prompts."""
    # Theirs computes layer norms in float32, whatever it is given.
    monkeypatch.setattr(clip.model.LayerNorm, "forward", nn.LayerNorm.forward)
    config = SIZES[size]
    theirs = openai_clip(config).to(dtype)
    ours = same_in_ours(theirs, config)
    images = torch.randn(3, 3, config.image_size, config.image_size, dtype=dtype)
    tokens, labels = random_tokens(5, config), torch.tensor([4, 0, 2])
    F.cross_entropy(theirs(images, tokens)[0], labels).backward()
    F.cross_entropy(ours(images, tokens), labels).backward()
    oracle, result = gradients(theirs), gradients(ours)
    assert result.keys() == oracle.keys()
    errors = {name: far(result[name], oracle[name]) for name in oracle}
    assert not {name: error for name, error in errors.items() if error > close}


def test_the_state_has_openais_names_in_openais_shapes():
    theirs = {name: t.shape for name, t in renamed(openai_clip(SMALL).state_dict()).items()}
    ours = {name: t.shape for name, t in CLIP(SMALL).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("ViT")])
def test_named_sizes_are_those_that_open_clip_lists(name):
    published = {"ViT-L/14@336px": "ViT-L-14-336"}.get(name, name.replace("/", "-"))
    listed = open_clip.get_model_config(f"{published}-quickgelu")
    vision, text, ours = listed["vision_cfg"], listed["text_cfg"], CONFIGS[name]
    assert ours.embed_dim == listed["embed_dim"]
    assert (ours.image_size, ours.patch_size) == (vision["image_size"], vision["patch_size"])
    assert (ours.vision_width, ours.vision_layers) == (vision["width"], vision["layers"])
    assert ours.vision_heads == vision["width"] // vision.get("head_width", 64)
    assert (ours.text_width, ours.text_layers) == (text["width"], text["layers"])
    assert ours.text_heads == text["heads"]
    assert (ours.context_length, ours.vocab_size) == (text["context_length"], text["vocab_size"])


def test_a_new_model_is_initialised_as_openais_is():
    """Every tensor has their mean, spread and shape of distribution, to six standard errors."""
    torch.manual_seed(0)
    config = SMALL
    ours = CLIP(config).state_dict()
    theirs = clip.model.CLIP(
        *(config.embed_dim, config.image_size, config.vision_layers, config.vision_width),
        *(config.patch_size, config.context_length, config.vocab_size),
        *(config.text_width, config.text_heads, config.text_layers),
    ).state_dict()
    for name, their in renamed(theirs).items():
        our, spread = ours[name], their.std().item() if their.numel() > 1 else 0.0
        if spread == 0:
            assert torch.equal(our, their), name
            continue
        error = 6 * spread * (2 / their.numel()) ** 0.5  # of a difference of two means
        assert abs(our.mean() - their.mean()) < error, name
        assert abs(our.std() - spread) < error, name
        # Of two distributions of one spread, a uniform one has the larger mean distance from 0.
        assert abs(our.abs().mean() - their.abs().mean()) < error, name


def test_forward_is_the_scaled_cosine_of_the_two_encodings():
    ours = same_in_ours(openai_clip(SMALL), SMALL)
    images, tokens = torch.randn(3, 3, 32, 32), random_tokens(4, SMALL)
    image, text = ours.encode_image(images), ours.encode_text(tokens)
    by_hand = torch.stack([F.cosine_similarity(one[None], text) for one in image])
    by_hand = ours.logit_scale.exp() * by_hand
    assert far(ours(images, tokens), by_hand) < CLOSE
    assert far(ours.logits(5 * image, 0.1 * text), by_hand) < CLOSE  # lengths do not matter


def test_logits_with_texts_of_its_own_for_each_image():
    ours = same_in_ours(openai_clip(SMALL), SMALL)
    image, text = torch.randn(3, 32), torch.randn(3, 7, 32)
    one_by_one = torch.cat([ours.logits(image[i : i + 1], text[i]) for i in range(3)])
    assert far(ours.logits(image, text), one_by_one) < CLOSE


@pytest.mark.parametrize("shape", [(64, 64), (32, 40), (31, 32)])
def test_an_image_of_the_wrong_size_is_one_line_that_says_both_sizes(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}.*32x32") as error:
        CLIP(SMALL).encode_image(torch.zeros(1, 3, *shape))
    assert "\n" not in str(error.value)


def test_quick_gelu_is_x_sigmoid_of_1_702_x():
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, -0.0, 1e4])]).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = QuickGELU()(ours.clone())
    assert far(y, theirs * torch.sigmoid(1.702 * theirs)) < 1e-12
    weights = torch.randn_like(x)
    (y * weights).sum().backward()
    (theirs * torch.sigmoid(1.702 * theirs) * weights).sum().backward()
    assert far(ours.grad, theirs.grad) < 1e-12
    assert far(QuickGELU()(x.clone()), y.detach()) == 0  # perhaps in place, without a gradient


MODULES = {
    "attention": lambda: Attention(64, 4),
    "block": lambda: Block(64, 4),
    "transformer": lambda: Transformer(64, 3, 4),
}
READS = {
    "class token": slice(0, 1),
    "some": [2, 5, 6],
    "twice and unsorted": torch.tensor([7, 0, 7, 3]),
    "all": slice(None),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("module", MODULES)
def test_reading_some_tokens_equals_computing_all_and_indexing(module, read, masked):
    torch.manual_seed(0)
    module, read = MODULES[module](), READS[read]
    mask = torch.full((9, 9), -torch.inf).triu(1) if masked else None
    x = torch.randn(2, 9, 64)
    results = []
    for compute in (lambda x: module(x, mask, read), lambda x: module(x, mask)[:, read]):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in module.parameters())))
    for some, full in zip(*results, strict=True):
        assert far(some, full) < CLOSE


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_blocks_from_first_on_continue_where_those_before_end(first):
    tower, x, mask = (
        Transformer(64, 3, 4),
        torch.randn(2, 9, 64),
        torch.full((9, 9), -torch.inf).triu(1),
    )
    whole = x
    for block in tower.resblocks[:first]:
        x = block(x, mask)
    assert torch.equal(tower(x, mask, [0, 4], first=first), tower(whole, mask, [0, 4]))


def test_bfloat16_autocast_runs_both_towers_and_stays_near():
    ours = same_in_ours(openai_clip(SMALL), SMALL)
    images, tokens = torch.randn(3, 3, 32, 32), random_tokens(4, SMALL)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = ours(images, tokens)
    assert 0 < far(rounded, ours(images, tokens)) < 0.05
