"""LoRA is the published correction (loralib's, peft's, the equation), merged or not."""

import contextlib
import math

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_min import CLIP, CONFIGS, UserError
from methods import METHODS
from methods.lora import GroupedLoRA, LoRA, LoRASettings, block_numbers

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
QUERY, KEY, VALUE = 0, 1, 2
PARTS = {
    "q and v": (QUERY, VALUE),
    "q, k and v": (QUERY, KEY, VALUE),
    "k": (KEY,),
    "v": (VALUE,),
}


def grouped(parts, rank=4, scale=0.7, dropout=0.0, of=3, width=12, d_in=20) -> GroupedLoRA:
    """A layer whose correction is not zero."""
    torch.manual_seed(0)
    layer = GroupedLoRA(nn.Linear(d_in, of * width), rank, scale, dropout, parts, of)
    nn.init.normal_(layer.lora_B)
    return layer


def in_loralib(layer: GroupedLoRA) -> loralib.MergedLinear:
    """The same layer in loralib."""
    theirs = loralib.MergedLinear(
        layer.base.in_features,
        layer.base.out_features,
        r=layer.rank,
        lora_alpha=layer.scale * layer.rank,
        lora_dropout=layer.dropout.p,
        enable_lora=[part in layer.parts for part in range(layer.of)],
    )
    theirs.load_state_dict({n.removeprefix("base."): t for n, t in layer.state_dict().items()})
    return theirs


def new_lora(clip, trained: bool = False, **settings) -> LoRA:
    """LoRA on `clip`; `trained`: with random tensors in place of the zeros it starts from."""
    torch.manual_seed(0)
    lora = LoRA(clip, NAMES, TEMPLATE, LoRASettings(**{"image_rank": 4, "text_rank": 3} | settings))
    if trained:
        for tensor in lora.adapter_state().values():
            nn.init.normal_(tensor, std=0.3)
    return lora


def zero_shot_logits(clip, images):
    method = METHODS["zero_shot"].plain(clip, NAMES, TEMPLATE)
    with torch.no_grad():
        return method(images)


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("parts", PARTS)
def test_output_gradients_and_merged_weight_equal_loralibs(parts, rank):
    layer = grouped(PARTS[parts], rank)
    theirs = in_loralib(layer)
    x, weights = torch.randn(2, 5, 20), torch.randn(2, 5, 36)
    ours_y, theirs_y = layer(x), theirs(x)
    torch.testing.assert_close(ours_y, theirs_y)
    (ours_y * weights).sum().backward()
    (theirs_y * weights).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, theirs.lora_A.grad)
    torch.testing.assert_close(layer.lora_B.grad, theirs.lora_B.grad)
    layer.merge()
    theirs.eval()  # which merges
    torch.testing.assert_close(layer.base.weight, theirs.weight)


@pytest.mark.parametrize("parts", PARTS)
def test_output_is_xw_plus_s_xba_on_the_rows_of_each_part(parts):
    parts = PARTS[parts]
    layer = grouped(parts, rank=4, scale=0.7)
    x = torch.randn(6, 20)
    expected = F.linear(x, layer.base.weight, layer.base.bias)
    for group, part in enumerate(parts):
        a = layer.lora_A[4 * group : 4 * group + 4]  # (R, D_in)
        b = layer.lora_B[12 * group : 12 * group + 12]  # (D, R)
        expected[:, 12 * part : 12 * part + 12] += 0.7 * x @ (b @ a).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_one_part_equals_peft_on_the_linear_layer_of_its_rows(scaling):
    import peft  # here, because it takes seconds

    rank, alpha = 4, 3.0
    scale = alpha / (rank if scaling == "rank" else math.sqrt(rank))
    layer = grouped((KEY,), rank, scale)
    rows = slice(12, 24)
    plain = nn.Sequential(nn.Linear(20, 12))
    plain[0].weight.data = layer.base.weight.data[rows]
    plain[0].bias.data = layer.base.bias.data[rows]
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=scaling == "sqrt"
    )
    theirs = peft.get_peft_model(plain, config)
    adapted = theirs.base_model.model[0]
    adapted.lora_A["default"].weight.data = layer.lora_A.data
    adapted.lora_B["default"].weight.data = layer.lora_B.data
    x = torch.randn(6, 20)
    torch.testing.assert_close(layer(x)[:, rows], theirs(x))
    assert torch.equal(layer(x)[:, :12], layer.base(x)[:, :12])  # the other parts: untouched
    assert torch.equal(layer(x)[:, 24:], layer.base(x)[:, 24:])


@pytest.mark.parametrize(("scaling", "scale"), [("rank", 6 / 4), ("sqrt", 6 / 2)])
def test_scaling_is_alpha_over_r_or_over_its_root(new_clip, scaling, scale):
    lora = new_lora(new_clip(), image_alpha=6.0, towers="image", scaling=scaling)
    assert {layer.scale for layer in lora.layers()} == {scale}


def test_a_starts_kaiming_uniform_and_b_at_zero():
    torch.manual_seed(0)
    layer = GroupedLoRA(nn.Linear(400, 300), rank=50, scale=1.0, parts=(0, 2), of=3)
    bound = 1 / math.sqrt(400)  # kaiming-uniform with a = √5
    a = layer.lora_A
    assert a.shape == (2 * 50, 400)
    assert 0.999 * bound < a.abs().max() <= bound
    assert a.mean().abs() < 0.02 * bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(layer.lora_B, torch.zeros(2 * 100, 50))


def test_untrained_lora_gives_the_logits_of_zero_shot_to_the_bit(new_clip, images):
    expected = zero_shot_logits(new_clip(), images)
    lora = new_lora(new_clip(), parts="qkvo").eval()
    assert torch.equal(lora(images), expected)
    with lora.inference():  # merged: W + 0
        assert torch.equal(lora(images), expected)


def test_trained_lora_changes_the_logits(new_clip, images):
    assert (
        not new_lora(new_clip(), trained=True)
        .eval()(images)
        .allclose(zero_shot_logits(new_clip(), images), atol=1e-2)
    )


def test_merged_logits_equal_unmerged_ones(new_clip, images):
    lora = new_lora(new_clip(), trained=True, parts="qkvo").eval()
    unmerged = lora(images)
    with lora.inference():
        torch.testing.assert_close(lora(images), unmerged, atol=1e-4, rtol=1e-4)


def test_a_merged_layer_is_one_plain_linear_layer():
    layer = grouped((QUERY, VALUE))
    x = torch.randn(6, 20)
    unmerged = layer(x)
    layer.merge()
    nn.init.zeros_(layer.lora_B)  # no longer read
    torch.testing.assert_close(layer(x), unmerged)
    torch.testing.assert_close(F.linear(x, layer.base.weight, layer.base.bias), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_weight_to_the_bit(dtype):
    layer = grouped((QUERY, VALUE))
    layer.base.to(dtype)
    before = layer.base.weight.clone()
    layer.merge()
    assert layer.base.weight.dtype == dtype
    assert not torch.equal(layer.base.weight, before)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


def test_a_half_precision_layer_keeps_its_correction_in_float32():
    layer = grouped((QUERY, VALUE))
    x = torch.randn(6, 20)
    full = layer(x)
    layer.base.to(torch.bfloat16)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)
    half.float().square().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_inference_leaves_weights_and_mode_as_they_were(new_clip, images, training, fails):
    lora = new_lora(new_clip(), trained=True).train(training)
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    with contextlib.suppress(MemoryError), lora.inference():
        assert not any(module.training for module in lora.modules())
        assert not lora(images).requires_grad
        if fails:
            raise MemoryError
    assert all(module.training == training for module in lora.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state_dict().items())
    lora(images).sum().backward()  # gradients flow again
    assert all(tensor.grad is not None for tensor in lora.adapter_state().values())


class OwnMasks(nn.Module):
    """CLIP-LoRA's way, written again: q, k and v are linear layers of their own, with dropout."""

    def __init__(self, attention, parts: str):
        super().__init__()
        layer, self.heads, self.out_proj = attention.in_proj, attention.heads, attention.out_proj
        width = layer.base.in_features
        halves = layer.base.weight.split(width), layer.base.bias.split(width)
        self.frozen = dict(zip("qkv", zip(*halves, strict=True), strict=True))
        pairs = zip(layer.lora_A.split(layer.rank), layer.lora_B.split(width), strict=True)
        self.delta = {
            part: (layer.scale * b @ a).detach() for part, (a, b) in zip(parts, pairs, strict=True)
        }
        self.p = layer.dropout.p

    def project(self, x, part: str):
        y = F.linear(x, *self.frozen[part])
        if part in self.delta:
            y = y + F.dropout(x, self.p, self.training) @ self.delta[part].T
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D/H)

    def forward(self, x, mask=None, read=None):
        q, k, v = (self.project(x, part) for part in "qkv")
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        y = y.transpose(1, 2).flatten(2)  # (B, T, D)
        return self.out_proj(y if read is None else y[:, read])


@pytest.mark.parametrize("parts", ["qkv", "qv"])
@pytest.mark.parametrize("masks", ["each", "shared"])
def test_each_of_q_k_and_v_has_a_dropout_mask_of_its_own_if_asked(masks, parts, new_clip, images):
    given = {"parts": parts, "dropout": 0.4, "towers": "image", "dropout_masks": masks}
    lora = new_lora(new_clip(), trained=True, **given)
    theirs = new_lora(new_clip(), trained=True, **given)
    for block in theirs.clip.visual.transformer.resblocks:
        block.attn = OwnMasks(block.attn, parts)
    logits = []
    for method in (lora, theirs):
        torch.manual_seed(4)  # the same draws, in the same order
        logits.append(method.train().clip.visual(images))
    assert torch.allclose(*logits, atol=1e-4) == (masks == "each")
    torch.testing.assert_close(lora.eval()(images), theirs.eval()(images), atol=1e-4, rtol=1e-4)


def test_dropout_acts_in_training_alone_and_on_the_correction_alone():
    layer = grouped((QUERY, VALUE), dropout=0.5)
    theirs = in_loralib(layer)
    x = torch.randn(6, 20)
    torch.manual_seed(1)
    once = layer(x)
    assert not torch.equal(layer(x), once)
    assert torch.equal(once[:, 12:24], layer.base(x)[:, 12:24])  # k, which has no correction
    torch.manual_seed(1)
    torch.testing.assert_close(once, theirs(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), grouped((QUERY, VALUE))(x))  # as without dropout


@pytest.mark.parametrize("towers", ["both", "image", "text"])
@pytest.mark.parametrize(
    ("parts", "projections"),
    [
        ("qv", ["in_proj"]),
        ("k", ["in_proj"]),
        ("o", ["out_proj"]),
        ("voq", ["in_proj", "out_proj"]),
    ],
)
def test_the_adapter_is_the_lora_tensors_of_the_chosen_layers(new_clip, towers, parts, projections):
    lora = new_lora(new_clip(), towers=towers, parts=parts, blocks="1")
    paths = {"image": "clip.visual.transformer", "text": "clip.transformer"}
    expected = {
        f"{path}.resblocks.1.attn.{projection}.lora_{letter}"
        for tower, path in paths.items()
        if towers in ("both", tower)
        for projection in projections
        for letter in "AB"
    }
    assert set(lora.adapter_state()) == expected
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize(
    ("parts", "same"), [("qv", (QUERY, VALUE)), ("vq", (QUERY, VALUE)), ("k", (KEY,))]
)
def test_parts_are_letters_in_any_order(new_clip, parts, same):
    lora = new_lora(new_clip(), parts=parts)
    assert {layer.parts for layer in lora.layers()} == {same}


@pytest.mark.parametrize("parts", ["", "x", "qx", "qq", "Q", "q,v"])
def test_wrong_parts_are_an_error_that_says_what_is_expected(new_clip, parts):
    with pytest.raises(UserError, match="--parts.*q, k, v, o"):
        new_lora(new_clip(), parts=parts)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_rank_above_the_width_is_an_error(new_clip, tower):
    new_lora(new_clip(), **{f"{tower}_rank": 64})
    with pytest.raises(UserError, match=f"--{tower}-rank 65: expected 1 to 64, the width"):
        new_lora(new_clip(), **{f"{tower}_rank": 65})


def test_each_tower_has_its_own_rank_and_alpha(new_clip):
    lora = new_lora(new_clip(), image_rank=8, image_alpha=4.0, text_rank=2, text_alpha=6.0)
    image = lora.clip.visual.transformer.resblocks[0].attn.in_proj
    text = lora.clip.transformer.resblocks[0].attn.in_proj
    assert (image.lora_A.shape, image.scale) == ((2 * 8, 64), 0.5)
    assert (text.lora_A.shape, text.scale) == ((2 * 2, 64), 3.0)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("0-2", [0, 1, 2]),
        ("5", [5]),
        ("1,3", [1, 3]),
        ("4-5,0", [0, 4, 5]),
        ("2,2", [2]),
    ],
)
def test_blocks_are_numbers_and_ranges(text, numbers):
    assert block_numbers(text, depth=6) == numbers
    assert block_numbers(text, depth=6, tower="text") == numbers
    assert block_numbers(f"0/{text}", depth=6, tower="text") == numbers
    assert block_numbers(f"{text}/0", depth=6, tower="image") == numbers


@pytest.mark.parametrize(
    "text", ["6", "0-6", "x", "", "3-1", "-1", "0,,1", "1-2-3", "some", "1.5", "1/", "1/2/3"]
)
def test_wrong_blocks_are_an_error_that_says_the_depth(text):
    with pytest.raises(UserError, match="--blocks.*below 6"):
        block_numbers(text, depth=6, tower="text")


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        # 12 blocks x parts x (A: R x D, B: D x R); image tower D = 768, text tower D = 512
        ("paper", 12 * 3 * (2 * 2 * 768 + 2 * 2 * 512)),
        ("notebook", 12 * 2 * (2 * 64 * 768 + 2 * 16 * 512)),
    ],
)
def test_trained_parameters_at_vit_b_16(recipe, count):
    with torch.device("meta"):  # shapes alone
        clip = CLIP(CONFIGS["ViT-B/16"])
    lora = LoRA(clip, NAMES, TEMPLATE, LoRASettings(**LoRA.recipes[recipe]))
    assert sum(tensor.numel() for tensor in lora.adapter_state().values()) == count
    if recipe == "paper":
        assert count == 184_320  # as the authors of CLIP-LoRA count


def test_the_paper_recipe_is_that_of_clip_loras_code():
    """run_utils.py, main.py, lora.py and loralib/layers.py of its repository."""
    s = LoRASettings(**LoRA.recipes["paper"])
    assert (s.optimizer, s.lr, s.weight_decay, s.batch_size) == ("adamw", 2e-4, 1e-2, 32)
    assert (s.steps_per_shot, s.schedule, s.min_lr) == (500, "step", 1e-6)
    assert (s.keep, s.patience, s.augment) == ("last", 0, "crop-flip")
    assert (s.image_rank, s.image_alpha, s.text_rank, s.text_alpha) == (2, 1, 2, 1)
    assert (s.parts, s.towers, s.blocks, s.scaling) == ("qkv", "both", "all", "sqrt")
    assert (s.dropout, s.dropout_masks) == (0.25, "each")


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_rank", 0), ("text_rank", -1), ("dropout", 1.5), ("dropout", -0.1), ("epochs", -1)],
)
def test_a_setting_out_of_range_is_an_error_that_names_its_flag(field, value):
    flag = field.replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} {value}: expected"):
        LoRASettings(**{field: value})


@pytest.mark.parametrize(
    "blocks", ["0-9999999999", f"0-{'9' * 5000}", "99999999999", "3-1", "1-2-3"]
)
def test_blocks_that_no_tower_has_are_refused_at_once(blocks):
    with pytest.raises(UserError, match="expected all, or numbers below 12"):
        block_numbers(blocks, 12)
