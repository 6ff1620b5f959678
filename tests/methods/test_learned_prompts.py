"""CoOp, CoCoOp and KgCoOp equal the published computation: logits, gradients, steps of training."""

import pytest
import torch
import torch.nn.functional as F
from published import PublishedCoCoOp, PublishedCoOp, PublishedKgCoOp, openai_text_tower

from clip_min import CLIP, CLIPConfig, UserError
from methods.cocoop import CoCoOp, CoCoOpSettings
from methods.coop import CoOp, CoOpSettings
from methods.kgcoop import KgCoOp, KgCoOpSettings
from methods.zero_shot import ZeroShot

NAMES = [
    "rose",
    "red rose",
    "colt's foot",
    "hard-leaved pocket orchid",
    "love in the mist",
    "R.O.S.E!",  # its last mark and the full stop after it are one token together
    "...",
    " ".join(["very"] * 18 + ["long", "name"]),  # 20 tokens
    "101 dalmatians",
    "ﬂower",  # a ligature, which cleaning takes apart
    "x",  # the same token as the placeholder
    "red rose",  # twice
]


@pytest.fixture(scope="module")
def clip():
    """The text tower of a real CLIP in small: heads 64 wide, as openai-clip wants them."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 1, 1, 128, 3, 2)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return clip


def features(count: int, seed: int = 1):
    return 3 * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def cocoop(clip, names, n_ctx=4, **settings):
    torch.manual_seed(2)
    words = "a photo of a" if n_ctx == 4 else ""
    return CoCoOp(clip, names, "", CoCoOpSettings(n_ctx=n_ctx, ctx_init=words, **settings))


def coop(clip, names, n_ctx=4, **settings):
    torch.manual_seed(2)
    words = "a photo of a" if n_ctx == 4 else ""
    return CoOp(clip, names, "", CoOpSettings(n_ctx=n_ctx, ctx_init=words, **settings))


def kgcoop(clip, near=8.0, template="a photo of a {}, a flower.", seed=2):
    """Away from where it starts, unless the seed is None."""
    method = KgCoOp(clip, NAMES, template, KgCoOpSettings(near=near))
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            method.context += 0.1 * torch.randn_like(method.context)
    return method


def published_cocoop(ours) -> PublishedCoCoOp:
    text = openai_text_tower(ours.clip)
    context = ours.context.detach().clone()
    return PublishedCoCoOp(text, ours.classnames, context, ours.meta_net)


def learned(model) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_step(ours, theirs, x, labels, tolerance=1e-5):
    """Logits, loss and every gradient agree to rounding."""
    mine, other = ours.classify(x), theirs(x)
    assert (mine - other).abs().max() < tolerance * other.abs().max()
    F.cross_entropy(mine, labels).backward()
    F.cross_entropy(other, labels).backward()
    assert set(learned(ours)) == set(learned(theirs))
    for name, parameter in learned(theirs).items():
        mine = learned(ours)[name].grad.view_as(parameter)
        assert (mine - parameter.grad).abs().max() < tolerance * parameter.grad.abs().max(), name


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:3], NAMES, NAMES * 8], ids=len)
@pytest.mark.parametrize("batch", [1, 5])
def test_cocoop_equals_the_published_way(clip, names, batch):
    ours = cocoop(clip, names)
    labels = torch.arange(batch) % len(names)
    # One class alone has loss 0 and gradients 0: train on the logit itself then.
    if len(names) == 1:
        x = features(batch)
        assert torch.allclose(ours.classify(x), published_cocoop(ours)(x), rtol=1e-5, atol=1e-5)
        return
    assert_equal_step(ours, published_cocoop(ours), features(batch), labels)


@pytest.mark.parametrize("n_ctx", [1, 2, 7, 16])
def test_cocoop_equals_the_published_way_for_any_context_length(clip, n_ctx):
    ours = cocoop(clip, NAMES, n_ctx)
    assert_equal_step(ours, published_cocoop(ours), features(3), torch.tensor([0, 5, 11]))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [1, 4, 5])
def test_coop_equals_the_published_way(clip, position, class_specific, n_ctx):
    # "R.O.S.E!" and "..." merge with the full stop where it follows them, so that the published
    # code, which counts a name's tokens, has no one place for the context behind them.
    names = [name for name in NAMES if position == "end" or name[-1] not in ".!"]
    ours = coop(clip, names, n_ctx, position=position, class_specific=class_specific)
    context = ours.context.detach().clone()
    if class_specific:  # (K·M, D) -> (K, M, D), different for every class
        with torch.no_grad():
            ours.context += 0.1 * torch.randn_like(ours.context)
        context = ours.context.detach().clone().unflatten(0, (len(names), n_ctx))
    theirs = PublishedCoOp(openai_text_tower(clip), names, context, position)
    assert_equal_step(ours, theirs, features(4), torch.tensor([0, 1, 2, 3]))


def test_context_of_words_is_zero_shot(clip):
    zero_shot = ZeroShot.plain(clip, NAMES, "a photo of a {}.")
    x = features(6)
    assert torch.allclose(
        coop(clip, NAMES).classify(x), zero_shot.classify(x), rtol=1e-5, atol=1e-5
    )
    conditional = cocoop(clip, NAMES)
    for parameter in conditional.meta_net[2].parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.allclose(conditional.classify(x), zero_shot.classify(x), rtol=1e-5, atol=1e-5)


def test_ten_steps_of_training_end_in_the_same_parameters(clip):
    ours = cocoop(clip, NAMES)
    theirs = published_cocoop(ours)
    for model, logits in ((ours, ours.classify), (theirs, theirs)):
        optimizer = torch.optim.SGD(learned(model).values(), lr=2e-3, momentum=0.9)
        for step in range(10):
            optimizer.zero_grad()
            labels = torch.tensor([step, step + 1]) % len(NAMES)
            F.cross_entropy(logits(features(2, seed=step)), labels).backward()
            optimizer.step()
    start = cocoop(clip, NAMES)
    for name, parameter in learned(theirs).items():
        moved = (parameter - learned(start)[name]).abs().max()
        assert moved > 0
        assert (learned(ours)[name] - parameter).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize("near", [0.0, 8.0, 1e4])
def test_kgcoop_equals_the_published_way(clip, near):
    ours = kgcoop(clip, near)
    written = [f"a photo of a {name}, a flower." for name in NAMES]
    text, context = openai_text_tower(clip), ours.context.detach().clone()
    theirs = PublishedKgCoOp(text, NAMES, context.clone(), written, near)
    optimizers = [torch.optim.SGD([m.context], lr=2e-3, momentum=0.9) for m in (ours, theirs)]
    for step in range(3):  # of training
        x, labels = features(4, seed=step), torch.tensor([step, 5, 6, 11])
        mine, other = ours.loss(x, labels), theirs.loss(x, labels)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.classify(x), theirs(x), rtol=1e-5, atol=1e-4)
        for optimizer, loss in zip(optimizers, (mine, other), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        grad = theirs.context.grad
        assert (ours.context.grad - grad).abs().max() < 1e-4 * grad.abs().max()
    moved = (theirs.context - context).abs().max()
    assert moved > 0
    assert (ours.context - theirs.context).abs().max() < 1e-3 * moved


def test_kgcoop_not_held_is_coop_and_held_hard_is_zero_shot(clip):
    x, labels = features(4), torch.tensor([0, 5, 6, 11])
    free = kgcoop(clip, near=0.0)
    plain = coop(clip, NAMES)
    plain.load_adapter(free.adapter_state())
    torch.testing.assert_close(free.loss(x, labels), plain.loss(x, labels))
    # From the template's own words it stands at the minimum of what holds it.
    held = kgcoop(clip, near=1e6, template="a photo of a {}.", seed=None)
    cross_entropy = coop(clip, NAMES).loss(x, labels)
    assert (held.loss(x, labels) - cross_entropy).abs() < 1e6 * 1e-6
    away = kgcoop(clip, near=1e6, template="a photo of a {}.")
    optimizer = torch.optim.Adam([away.context], lr=3e-3)
    start = away.context.detach().clone()
    distance = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = away.loss(x, labels)
        loss.backward()
        optimizer.step()
        distance.append(loss.item() / 1e6)  # 1 - cosine, as good as alone
    assert not torch.equal(away.context, start)
    assert distance[-1] < 0.1 * distance[0]


def test_kgcoop_is_held_near_the_classes_it_has(clip):
    method = kgcoop(clip)
    method.written_features()
    other = method.for_classes(NAMES[:2])
    torch.testing.assert_close(other.written_features(), method.written_features()[:2])
    assert not other.written_features().requires_grad


@pytest.mark.parametrize("max_tokens", [1, 60, 200])
def test_bounded_memory_changes_nothing(clip, max_tokens):
    whole, pieces = cocoop(clip, NAMES), cocoop(clip, NAMES, max_tokens=max_tokens)
    x, labels = features(7), torch.arange(7)
    assert torch.allclose(whole.classify(x), pieces.classify(x), rtol=1e-5, atol=1e-5)
    for model in (whole, pieces):
        model.loss(x, labels).backward()
    for name, parameter in learned(whole).items():
        difference = (learned(pieces)[name].grad - parameter.grad).abs().max()
        assert difference < 1e-5 * parameter.grad.abs().max(), name


def test_one_image_at_a_time_equals_a_batch(clip):
    model = cocoop(clip, NAMES)
    x = features(5)
    with model.inference():
        single = torch.cat([model.classify(row) for row in x.split(1)])
        assert torch.allclose(model.classify(x), single, rtol=1e-5, atol=1e-5)


def test_other_classes_use_the_learned_context(clip):
    model = cocoop(clip, NAMES)
    torch.nn.init.normal_(model.context)
    others = ["sweet pea", "moon orchid"]
    fresh = cocoop(clip, others)
    fresh.load_adapter(model.adapter_state())
    assert torch.equal(model.for_classes(others).classify(features(3)), fresh.classify(features(3)))


def test_class_specific_context_knows_no_other_class(clip):
    model = coop(clip, NAMES, class_specific=True)
    assert not model.names_unseen
    with pytest.raises(UserError, match="cannot name classes"):
        model.for_classes(["sweet pea"])


def test_class_specific_context_starts_from_the_words_or_at_random_for_every_class(clip):
    words = coop(clip, NAMES[:3]).context
    assert torch.equal(coop(clip, NAMES[:3], class_specific=True).context, words.repeat(3, 1))
    context = coop(clip, NAMES, n_ctx=16, class_specific=True).context.unflatten(0, (-1, 16))
    flat = context.flatten(1)  # (K, M·D) of N(0, 0.02)
    assert flat.std().item() == pytest.approx(0.02, rel=0.02)
    alike = torch.corrcoef(flat.detach()).fill_diagonal_(0).abs().max()
    assert alike < 0.15  # 3 standard deviations of 1/√(M·D) = 0.022 are 0.066


def test_parameter_counts_are_the_published_ones():
    """ViT-B/16: CoOp with M = 16 has 8,192 and CoCoOp 35,360 learned numbers."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(512, 32, 32, 64, 1, 1, 512, 1, 8))
    sixteen = coop(clip, ["rose"], n_ctx=16)
    assert sum(p.numel() for p in sixteen.adapter_state().values()) == 8_192
    assert sum(p.numel() for p in cocoop(clip, ["rose"]).adapter_state().values()) == 35_360
    assert sum(p.numel() for p in kgcoop(clip).adapter_state().values()) == 4 * 512


def test_coops_recipes_are_the_published_ones():
    """Few-shot: 16 random vectors; base to novel: 4 from the words. SGD, 200 epochs."""
    for name, start in (("few-shot", (16, "")), ("paper", (4, "a photo of a"))):
        s = CoOpSettings(**CoOp.recipes[name])
        assert (s.n_ctx, s.ctx_init) == start
        assert (s.epochs, s.optimizer, s.lr, s.batch_size) == (200, "sgd", 2e-3, 32)
        assert (s.position, s.class_specific, s.augment) == ("end", False, "crop-flip")
        assert (s.warmup_epochs, s.warmup_lr, s.weight_decay) == (1, 1e-5, 5e-4)


def test_context_length_must_fit_the_words(clip):
    with pytest.raises(UserError, match="--n-ctx 5: --ctx-init 'a photo of a' has 4 tokens"):
        CoOp(clip, NAMES, "", CoOpSettings(n_ctx=5))
    with pytest.raises(UserError, match="--n-ctx 0: expected"):
        CoOpSettings(n_ctx=0)


def test_a_prompt_too_long_names_the_class(clip):
    long = " ".join(["peony"] * 70)
    with pytest.raises(UserError, match=r"peony peony.* tokens"):
        coop(clip, ["rose", long], n_ctx=16)


def test_images_and_their_features_give_the_same_logits(clip):
    images, model = torch.randn(3, 3, 32, 32), cocoop(clip, NAMES)
    with torch.no_grad():
        expected = model.classify(clip.encode_image(images))
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-5)
