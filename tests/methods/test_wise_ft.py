"""The line from zero-shot CLIP to what was learned: its ends to the bit, its middle by hand."""

import pytest
import torch
from torch import Tensor

from clip_min import UserError
from methods import METHODS, Method
from methods.wise_ft import keep_share

NAMES = ["rose", "red tulip", "ox-eye daisy", "bird of paradise"]
TEMPLATE = "a photo of a {}."
CASES = [
    ("finetune", {}),
    ("finetune", {"train": "last-1"}),
    ("finetune", {"train": "text"}),
    ("lora", {}),
    ("lora", {"parts": "kqo", "towers": "image", "blocks": "1", "scaling": "sqrt"}),
    ("disef", {}),
    ("disef_f1", {}),
    ("prolip", {}),
    ("prolip", {"templates": ("a {}.", "the {}!")}),
    ("cross_modal", {}),
    ("projection", {}),
    ("coop", {}),
    ("kgcoop", {}),
]
REFUSED = [
    ("zero_shot", {}),
    ("linear_probe", {}),
    ("clip_adapter", {}),
    ("projection", {"activation": "relu"}),
    ("lp_plus_plus", {}),
    ("tip_adapter", {}),
    ("tip_adapter_f", {}),
    ("gda", {}),
    ("coop", {"ctx_init": "this is a picture", "n_ctx": 4}),  # the template is another
    ("coop", {"ctx_init": ""}),
    ("coop", {"class_specific": True}),
    ("coop", {"position": "front"}),
    ("kgcoop", {"depth_head": True}),
    ("cocoop", {}),
    ("vpt", {}),
    ("promptsrc", {}),
    ("two_stage", {}),
    ("em_dirichlet", {}),
    ("transclip", {}),
]


def new(name: str, settings: dict, clip, template: str = TEMPLATE) -> Method:
    torch.manual_seed(0)
    return METHODS[name](clip, NAMES, template, METHODS[name].Settings(**settings)).eval()


def learn(method: Method) -> dict[str, Tensor]:
    """Some other tensors in place of all it starts from; copies of them."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in method.adapter_state().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=rng)
    return {name: tensor.detach().clone() for name, tensor in method.adapter_state().items()}


def logits(method: Method, images: Tensor) -> Tensor:
    with method.inference():
        return method(images)


def test_every_method_is_decided():
    decided = {name for name, _ in CASES + REFUSED}
    assert decided == set(METHODS), "does it start at zero-shot CLIP? CASES, if so, else REFUSED"


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_its_ends_are_zero_shot_and_what_was_learned(name, settings, new_clip, images):
    clip = new_clip()
    templates = {"templates": settings.get("templates", ())}
    method, zero_shot = new(name, settings, clip), new("zero_shot", templates, clip)
    learned = learn(method)
    at_one, at_zero = logits(method, images), logits(zero_shot, images)
    assert (at_one - at_zero).abs().max() > 1e-3
    method.load_adapter(keep_share(method, learned, 0.0))
    if name == "projection":  # features are normalised before the layers and behind them
        torch.testing.assert_close(logits(method, images), at_zero, rtol=1e-6, atol=1e-5)
    else:
        assert torch.equal(logits(method, images), at_zero)
    method.load_adapter(keep_share(method, learned, 1.0))
    assert torch.equal(logits(method, images), at_one)
    method.load_adapter(keep_share(method, learned, 0.5))
    for end in (at_zero, at_one):
        assert (logits(method, images) - end).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_starts_at_zero(name, settings, new_clip):
    """Where a method says that its line begins is where its training does."""
    method = new(name, settings, new_clip())
    start = {n: t.detach().clone() for n, t in method.adapter_state().items()}
    at_zero = keep_share(method, learn(method), 0.0)
    for key, tensor in start.items():
        if not key.endswith("lora_A"):  # random, and of no effect while B is 0
            assert torch.equal(at_zero[key], tensor)


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_between_the_ends_weights_are_their_weighted_mean(share, new_clip):
    clip = new_clip()
    method = new("finetune", {}, clip)
    learned = learn(method)
    kept = keep_share(method, learned, share)
    assert kept.keys() == learned.keys()
    for key, tensor in kept.items():
        start = clip.get_parameter(key.removeprefix("clip.")).double()
        expected = start + share * (learned[key].double() - start)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_of_lora_the_merged_weights_are_not_the_factors(new_clip):
    clip = new_clip()
    method = new("lora", {"image_rank": 4, "text_rank": 3}, clip)
    learned = learn(method)
    whole = {n: layer.delta() for n, layer in method.named_modules() if hasattr(layer, "delta")}
    method.load_adapter(keep_share(method, learned, 0.3))
    for name, layer in method.named_modules():
        if name in whole:
            torch.testing.assert_close(layer.delta(), 0.3 * whole[name])
            assert torch.equal(layer.lora_A, learned[f"{name}.lora_A"])
    assert len(whole) == 4


@pytest.mark.parametrize(("name", "settings"), REFUSED)
def test_without_such_a_start_there_is_no_line(name, settings, new_clip):
    method = new(name, settings, new_clip())
    with pytest.raises(UserError, match="--keep-share 0.5: .*did not start at zero-shot") as error:
        keep_share(method, method.adapter_state(), 0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["coop", "kgcoop"])
def test_learned_words_start_at_zero_shot_only_with_the_template_they_are(name, new_clip):
    method = new(name, {}, new_clip(), "a photo of a {}, a type of flower.")
    with pytest.raises(UserError, match="'a photo of a {}, a type of flower.'"):
        keep_share(method, method.adapter_state(), 0.5)
