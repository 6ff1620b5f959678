"""What every method promises: what it learns, saves and loads, and how it changes its classes."""

import typing
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_min import CLIP, CLIPConfig, UserError, tokenize
from methods import METHODS, BaseSettings, Method, TrainingSettings
from methods.support import WithSupport

NAMES = ["rose", "red tulip", "ox-eye daisy", "bird of paradise"]
OTHERS = ["sweet pea", "rose", "moon orchid"]  # one of them known, and fewer
TEMPLATE = "a photo of a {}."

every_method = pytest.mark.parametrize("name", METHODS)


def new(name: str, clip, classnames=NAMES, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = METHODS[name](clip, classnames, TEMPLATE, METHODS[name].Settings())
    if isinstance(method, WithSupport):  # three images of the first two classes
        features = torch.randn(3, clip.config.embed_dim)
        method.remember(SimpleNamespace(encoded=lambda _: features, labels=torch.tensor([0, 1, 0])))
    return method


def train_by_chance(method: Method) -> Method:
    """Random tensors in place of what the method starts from, so that everything matters."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in method.adapter_state().values():
            if tensor.is_floating_point():  # not the labels of images
                tensor += 0.1 * torch.rand(tensor.shape, generator=rng)
    return method.eval()


def logits(method: Method, images: Tensor) -> Tensor:
    with method.inference():
        return method(images)


def padded_text_features(clip, prompts: list[str]) -> Tensor:
    """One prompt at a time through all 77 positions under a causal mask, as OpenAI's code does."""
    rows = []
    for tokens in tokenize(prompts):
        x = (clip.token_embedding(tokens) + clip.positional_embedding)[None]  # (1, 77, D)
        x = clip.transformer(x, torch.full((77, 77), -torch.inf).triu(1))
        x = clip.ln_final(x)[0, tokens.argmax()]  # (D,)
        rows.append(x @ clip.text_projection)
    return torch.stack(rows)


@every_method
def test_logits_are_a_row_for_each_image_and_a_column_for_each_class(name, new_clip, images):
    assert logits(new(name, new_clip()), images).shape == (5, 4)


@every_method
def test_gradients_reach_the_adapter_and_nothing_else(name, new_clip, images):
    method = train_by_chance(new(name, new_clip())).train()
    loss = method.loss(method.encode(images), torch.tensor([0, 1, 2, 3, 0]))
    assert loss.shape == ()
    learned = {n for n, tensor in method.adapter_state().items() if tensor.requires_grad}
    assert loss.requires_grad == bool(learned)
    if learned:
        loss.backward()
    if name == "two_stage":  # that was its second stage; before it, its classifier is all zeros
        assert [n for n in learned if method.get_parameter(n).grad is not None] == ["classifier"]
        method.classifier.data.zero_()
        method.loss(method.encode(images), torch.tensor([0, 1, 2, 3, 0])).backward()
    moved = {n for n, p in method.named_parameters() if p.grad is not None}
    assert moved == learned
    assert {n for n, p in method.named_parameters() if p.requires_grad} == learned


@pytest.mark.parametrize("name", ["zero_shot", "coop", "promptsrc"])
@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"vocab_size": 1000}, "up to 77 tokens from a vocabulary of 1,000, .* from CLIP's 49,408"),
        ({"context_length": 9}, "up to 9 tokens .*have up to 1[0-9] from .*or shorter prompts"),
    ],
)
def test_prompts_that_a_model_cannot_read_are_one_line(name, sizes, said):
    clip = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2, **sizes))
    with pytest.raises(UserError, match=said):
        new(name, clip)
    short = CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2, context_length=40))
    assert len(new(name, short).classnames) == 4


@every_method
def test_an_adapter_loaded_into_a_fresh_instance_gives_the_same_logits(name, new_clip, images):
    trained = train_by_chance(new(name, new_clip()))
    state = {n: t.detach().clone() for n, t in trained.adapter_state().items()}
    fresh = new(name, new_clip(), seed=1)
    if state:
        assert not torch.equal(logits(fresh, images), logits(trained, images))
    fresh.load_adapter(state)
    assert torch.equal(logits(fresh, images), logits(trained, images))


@every_method
def test_loading_copies_the_tensors(name, new_clip):
    method = new(name, new_clip())
    state = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    method.load_adapter(state)
    train_by_chance(method)
    moved = {n: t for n, t in method.adapter_state().items() if t.is_floating_point()}
    assert not any(torch.equal(tensor, state[n]) for n, tensor in moved.items())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
@every_method
def test_an_adapter_that_does_not_fit_is_an_error_that_names_the_tensor(name, damage, new_clip):
    method = new(name, new_clip())
    state = {n: t.detach() + 1 for n, t in method.adapter_state().items()}
    if damage == "unexpected":
        first, state["stranger"] = "stranger", torch.zeros(2)
    elif not state:
        pytest.skip("nothing is learned, so nothing can be missing or misshapen")
    else:
        first = next(iter(state))
        if damage == "missing":
            del state[first]
        else:
            state[first] = torch.zeros(7, 7, 7)
    before = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    with pytest.raises(UserError, match=first) as error:
        method.load_adapter(state)
    assert "\n" not in str(error.value)
    assert damage == "missing" or "missing" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in method.adapter_state().items())  # all or none


@every_method
def test_for_classes_equals_a_fresh_method_of_those_classes_with_the_same_adapter(
    name, new_clip, images
):
    trained = train_by_chance(new(name, new_clip()))
    if not trained.names_unseen:
        with pytest.raises(UserError, match="cannot name"):
            trained.for_classes(OTHERS)
        return
    other = trained.for_classes(OTHERS)
    if hasattr(trained, "learned_names"):  # images or rows keep the names they were learned with
        fresh = new(name, new_clip())
        fresh.set_classes(OTHERS)
    else:
        fresh = new(name, new_clip(), OTHERS)
    fresh.load_adapter(trained.adapter_state())
    assert other.classnames == OTHERS
    assert logits(other, images).shape == (5, 3)
    assert torch.equal(logits(other, images), logits(fresh, images))


@every_method
def test_for_classes_shares_every_tensor_and_leaves_the_original_alone(name, new_clip, images):
    trained = train_by_chance(new(name, new_clip()))
    if not trained.names_unseen:
        pytest.skip("it knows no other classes")
    before = logits(trained, images)
    other = trained.for_classes(OTHERS)
    assert other.clip is trained.clip
    mine, theirs = ({n: p.data_ptr() for n, p in m.named_parameters()} for m in (trained, other))
    assert mine == theirs
    assert trained.classnames == NAMES
    assert torch.equal(logits(trained, images), before)
    train_by_chance(trained)  # learned further: the copy learns along
    if trained.adapter_state():
        assert not torch.equal(logits(trained, images), before)
    assert all(
        torch.equal(tensor, other.adapter_state()[n])
        for n, tensor in trained.adapter_state().items()
    )


@every_method
def test_one_seed_gives_one_start_and_one_first_loss(name, new_clip, images):
    labels = torch.tensor([0, 1, 2, 3, 0])
    states, losses = [], []
    for _ in range(2):
        method = new(name, new_clip(), seed=3).train()
        states.append(method.adapter_state())
        losses.append(method.loss(method.encode(images), labels))
    assert torch.equal(*losses)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in states[0].items())


@every_method
def test_class_features_computed_once_in_inference_are_those_of_the_moment(name, new_clip, images):
    method = train_by_chance(new(name, new_clip()))
    first = logits(method, images)
    with method.inference():
        x = method.encode(images)
        assert torch.equal(method.classify(x), method.classify(x))
    train_by_chance(method)
    if method.adapter_state():  # nothing of the earlier tensors is kept
        assert not torch.equal(logits(method, images), first)


@every_method
def test_recipes_are_settings_of_the_right_type(name):
    hints = typing.get_type_hints(METHODS[name].Settings)
    names = {field.name for field in fields(METHODS[name].Settings)}
    for recipe in METHODS[name].recipes.values():
        assert set(recipe) <= names
        METHODS[name].Settings(**recipe)  # in range
        for key, value in recipe.items():
            if typing.get_origin(hints[key]) is typing.Literal:
                assert value in typing.get_args(hints[key])
            else:
                assert type(value) is hints[key], key


@every_method
def test_a_method_says_in_one_line_what_it_is_and_every_setting_what_it_means(name):
    assert 10 < len(METHODS[name].title) < 80
    hints = typing.get_type_hints(METHODS[name].Settings, include_extras=True)
    for field in fields(METHODS[name].Settings):
        kind, meaning = typing.get_args(hints[field.name])
        assert meaning
        if typing.get_origin(kind) is typing.Literal:
            assert field.default in typing.get_args(kind)


@pytest.mark.parametrize("name", ["zero_shot", "lora"])
@pytest.mark.parametrize(
    "classnames",
    [
        ["rose"],
        ["rose", "red rose", "red", "rose"],
        ["{}", "a {b} c", "{0}", "%s", "🌹", "pink-yellow dahlia?", "a..b"],
        [f"flower number {i}" for i in range(100)],  # several chunks of a tree
    ],
    ids=["one", "alike", "strange", "many"],
)
def test_text_features_equal_padded_prompts_encoded_one_by_one(name, classnames, new_clip):
    method = train_by_chance(new(name, new_clip(), classnames))
    with torch.no_grad():
        naive = padded_text_features(method.clip, [f"a photo of a {n}." for n in classnames])
        torch.testing.assert_close(method.text_features(), naive, atol=1e-4, rtol=1e-4)


def test_zero_shot_is_the_scaled_cosine_of_image_and_prompt(new_clip, images):
    clip = new_clip()
    with torch.no_grad():
        text = padded_text_features(clip, [f"a photo of a {n}." for n in NAMES])
        by_hand = [
            clip.logit_scale.exp() * torch.cosine_similarity(f[None], text)
            for f in clip.encode_image(images)
        ]
        zero_shot = logits(new("zero_shot", clip), images)
        torch.testing.assert_close(zero_shot, torch.stack(by_hand), atol=1e-4, rtol=1e-4)
        base = Method(clip, NAMES, TEMPLATE, BaseSettings())  # the same, from images
        torch.testing.assert_close(logits(base, images), zero_shot)


@pytest.mark.parametrize("template", ["a photo of a flower.", "{ }", "", "{0}"])
def test_a_template_without_a_place_for_the_name_is_an_error_that_shows_it(template, new_clip):
    with pytest.raises(UserError, match="has no {}") as error:
        Method(new_clip(), NAMES, template, BaseSettings())
    assert repr(template) in str(error.value)


def test_inference_computes_class_features_once_and_drops_gradients(new_clip, images):
    method = Method(new_clip(), NAMES, TEMPLATE, BaseSettings())
    calls = []
    method.prompts.register_forward_hook(lambda *_: calls.append(1))
    with method.inference():
        for _ in range(3):
            method(images)
    assert len(calls) == 1
    for _ in range(3):
        method(images)
    assert len(calls) == 1  # nothing in the texts learns
    method.text_learns = True
    for _ in range(3):
        method(images)
    assert len(calls) == 4


@every_method
def test_the_clip_that_a_method_is_lent_stays_as_it_is(name, new_clip, images):
    """Its modules, its tensors, their flags and its logits, whatever the method learns and does."""
    clip, same = new_clip(), new_clip()
    modules, tensors = dict(clip.named_modules()), dict(clip.named_parameters())
    method = train_by_chance(new(name, clip)).train()
    loss = method.loss(method.encode(images), torch.tensor([0, 1, 2, 3, 0]))
    if loss.requires_grad:
        loss.backward()
    logits(method, images)
    train_by_chance(method)
    assert all(now is modules[n] for n, now in clip.named_modules())
    assert all(now is tensors[n] for n, now in clip.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in clip.parameters())
    assert all(torch.equal(p, q) for p, q in zip(clip.parameters(), same.parameters(), strict=True))
    assert clip.training == same.training
    tokens = tokenize(NAMES)
    assert torch.equal(clip(images, tokens), same(images, tokens))


def test_methods_over_one_clip_are_used_side_by_side(new_clip, images):
    """Each as if it were alone, and the frozen tensors stand in memory once."""
    clip = new_clip()
    side_by_side = {name: train_by_chance(new(name, clip)) for name in METHODS}
    for name, method in side_by_side.items():
        alone = train_by_chance(new(name, new_clip()))
        assert torch.equal(logits(method, images), logits(alone, images)), name
        shared = {p.data_ptr() for p in clip.parameters()}
        own = {
            p.data_ptr() for n, p in method.named_parameters() if n not in method.adapter_state()
        }
        assert own - {0} <= shared | {p.data_ptr() for p in method.adapter_state().values()}, name


@pytest.mark.parametrize(
    ("name", "settings", "shape"),
    [
        ("zero_shot", {}, (5, 32)),
        ("lora", {"towers": "text"}, (5, 32)),
        ("finetune", {"train": "text"}, (5, 32)),
        ("lora", {"blocks": "1/all"}, (5, 17, 64)),
        ("finetune", {"train": "last-1"}, (5, 17, 64)),
        ("vpt", {"first_block": 1}, (5, 17, 64)),
        ("lora", {}, (5, 3, 32, 32)),
        ("finetune", {}, (5, 3, 32, 32)),
        ("vpt", {}, (5, 3, 32, 32)),
        ("disef", {"blocks": "1/all", "mixup": 0.1}, (5, 3, 32, 32)),  # images are mixed
    ],
)
def test_encode_is_what_stays_as_it_is_while_a_method_learns(
    name, settings, shape, new_clip, images
):
    """The beginning of the tower before the first block that learns: an equal loss, gradients of
    all that learns, and nothing to compute again.
    """
    clip, labels = new_clip(), torch.tensor([0, 1, 2, 3, 0])
    method = METHODS[name](clip, NAMES, TEMPLATE, METHODS[name].Settings(**settings))
    train_by_chance(method)
    x = method.encode(images)
    assert x.shape == shape
    assert not x.requires_grad
    assert torch.equal(method.classify(x), method(images))
    if name == "zero_shot":
        return
    losses, gradients = [], []
    for first in (method.first_block, 0):  # 0: all of it computed in every step
        method.first_block = first
        method.zero_grad()
        loss = F.cross_entropy(method(images), labels)
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in method.parameters() if p.requires_grad])
    assert torch.equal(*losses)
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive)
    train_by_chance(method)
    method.first_block = {2: None, 3: 1, 4: 0}[x.dim()]
    assert torch.equal(method.encode(images), x)  # whatever was learned


@pytest.mark.parametrize("value", [-1, float("nan")])
@pytest.mark.parametrize("field", TrainingSettings.limits)
def test_a_training_setting_out_of_range_is_an_error_that_names_its_flag(field, value):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} {value}: expected . or more"):
        TrainingSettings(**{field: value})


def test_the_default_loss_is_cross_entropy(new_clip, images):
    method = Method(new_clip(), NAMES, TEMPLATE, BaseSettings())
    labels = torch.tensor([0, 3, 2, 1, 0])
    rows = method(images).log_softmax(-1)
    by_hand = -sum(row[label] for row, label in zip(rows, labels, strict=True)) / 5
    torch.testing.assert_close(method.loss(method.encode(images), labels), by_hand)


def test_fit_by_default_hands_itself_to_the_gradient_loop(new_clip):
    seen = []
    Method(new_clip(), NAMES, TEMPLATE, BaseSettings()).fit("train", "val", seen.append)
    assert not seen  # nothing is learned
    method = new("lora", new_clip())
    method.fit("train", "val", lambda *arguments: seen.extend(arguments))
    assert seen == [method, "train", "val"]


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), 1e39, "x", None, True]
)
@every_method
def test_a_setting_that_is_no_finite_number_is_an_error_that_names_its_flag(name, value):
    kind = METHODS[name].Settings
    for field, hint in typing.get_type_hints(kind).items():
        if hint is float:
            with pytest.raises(UserError, match=f"^--{field.replace('_', '-')} .*: expected "):
                kind(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("scaling", "x", "--scaling x: expected rank or sqrt"),
        ("scaling", None, "--scaling None: expected rank or sqrt"),
        ("epochs", 1.5, "--epochs 1.5: expected a whole number"),
        ("epochs", 10**30, "--epochs 10000.*: expected a whole number"),
        ("image_rank", [4], r"--image-rank \[4\]: expected a whole number"),
        ("parts", 3, "--parts 3: expected text"),
        ("blocks", "\udcff", "--blocks .*: expected text"),
    ],
)
def test_a_setting_of_another_type_is_named(field, value, said):
    with pytest.raises(UserError, match=said):
        METHODS["lora"].Settings(**{field: value})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "integers", "complex", "too large"])
@every_method
def test_an_adapter_of_other_numbers_is_an_error_that_names_the_tensor(name, bad, new_clip):
    method = new(name, new_clip())
    before = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    for key, tensor in before.items():
        if not tensor.is_floating_point():
            changed = tensor.float()
        elif bad == "integers":
            changed = tensor.long()
        elif bad == "complex":
            changed = tensor.to(torch.complex64)
        else:
            changed = tensor.double().flatten()
            changed[-1] = 1e300 if bad == "too large" else bad
            changed = changed.reshape(tensor.shape)
        with pytest.raises(UserError, match=key):
            method.load_adapter(before | {key: changed})
        assert all(torch.equal(t, before[n]) for n, t in method.adapter_state().items())


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("support_labels", torch.tensor([0, 4, 1]), "support_labels are 0 to 4, .* 4 classes"),
        ("support_labels", torch.tensor([0, -1, 1]), "support_labels are -1 to 1"),
        ("support_labels", torch.tensor([[1]]), "support_labels has shape"),
        ("support", torch.tensor(1.0), "support has shape"),
    ],
)
@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f"])
def test_images_kept_with_labels_of_no_class_are_refused(name, key, tensor, said, new_clip):
    method = new(name, new_clip())
    state = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    with pytest.raises(UserError, match=said):
        method.load_adapter(state | {key: tensor})
    assert all(torch.equal(t, state[n]) for n, t in method.adapter_state().items())
