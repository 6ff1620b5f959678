"""Prompts written for each class: against openai-clip's text tower, one padded prompt at a time."""

import json
from dataclasses import asdict

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F
from published import openai_text_tower

from clip_min import CLIP, CLIPConfig, UserError
from methods import METHODS
from methods.class_prompts import read_prompts, strangers
from methods.templates import PromptSettings, TemplateSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy"]
TEMPLATE = "a photo of a {}."
OWN = {  # one, two and three texts, in another order than the names'
    "ox-eye daisy": ["white petals around a yellow disc.", "a daisy, a kind of {}.", "a field."],
    "rose": ["a rose has thorns."],
    "red_tulip": ["a photo of a red tulip, a type of flower.", "a cup of six red petals."],
}
READ_PROMPTS = [name for name, kind in METHODS.items() if issubclass(kind.Settings, PromptSettings)]


@pytest.fixture
def clip() -> CLIP:
    """Tiny, with heads as wide as openai-clip has them."""
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 64, 2, 1, 64, 2, 1)).eval()


@pytest.fixture
def file(tmp_path):
    """(content) -> a file that holds it, as JSON unless it is text already."""

    def write(content) -> str:
        path = tmp_path / "own.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def naive(clip, own: list[list[str]]) -> torch.Tensor:
    """Each text alone through openai-clip's tokenizer and tower; on the sphere; mean; again."""
    tower = openai_text_tower(clip)
    rows = []
    for texts in own:
        units = [F.normalize(tower.encode_text(openai_clip.tokenize(t))[0], dim=0) for t in texts]
        rows.append(F.normalize(torch.stack(units).mean(dim=0), dim=0))
    return torch.stack(rows)


def new(name: str, clip, prompts, names=NAMES, **settings):
    torch.manual_seed(3)
    settings = METHODS[name].Settings(prompts=prompts, **settings)
    return METHODS[name](clip, names, TEMPLATE, settings)


def test_a_class_is_the_mean_of_its_own_texts_as_the_naive_way_finds_it(clip, file, images):
    method = new("zero_shot", clip, file(OWN))
    spelled = [OWN["rose"], OWN["red_tulip"], [t.replace("{}", NAMES[2]) for t in OWN[NAMES[2]]]]
    text = naive(clip, spelled)
    torch.testing.assert_close(F.normalize(method.class_features(), dim=-1), text)
    f = F.normalize(clip.encode_image(images), dim=-1)
    expected = clip.logit_scale.exp() * f @ text.T
    torch.testing.assert_close(method(images), expected, atol=1e-4, rtol=1e-4)
    other = method.for_classes(["red_tulip", "rose"])  # also as files spell it
    text = F.normalize(other.class_features(), dim=-1)
    torch.testing.assert_close(text, naive(clip, [spelled[1], spelled[0]]))


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_a_file_that_spells_out_the_templates_gives_what_they_give(name, clip, file, images):
    """Of one template and, for those that read several, of two."""
    several = issubclass(METHODS[name].Settings, TemplateSettings)
    for templates in [[TEMPLATE], *([["a {}.", "the {} and a {}"]] if several else [])]:
        given = {"templates": "|".join(templates)} if several else {}
        spelled = {n: [t.replace("{}", n) for t in templates] for n in NAMES}
        by_file = new(name, clip, file(spelled)).eval()
        by_template = new(name, clip, None, **given).eval()
        for method in (by_file, by_template):
            with torch.no_grad():
                for tensor in method.adapter_state().values():
                    if tensor.is_floating_point():
                        tensor += 0.01
        x, labels = by_file.encode(images), torch.tensor([0, 1, 2, 2, 0])
        torch.testing.assert_close(by_file.classify(x), by_template.classify(x))
        loss = by_file.loss(x, labels)
        torch.testing.assert_close(loss, by_template.loss(x, labels))


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_other_texts_change_what_is_learned_from(name, clip, file, images):
    by_file, by_template = (new(name, clip, given).eval() for given in (file(OWN), None))
    x, labels = by_file.encode(images), torch.tensor([0, 1, 2, 2, 0])
    assert by_file.loss(x, labels) != by_template.loss(x, labels)


def test_who_reads_them():
    learned = {"linear_probe", "coop", "cocoop"}  # no text at all, or vectors around the name
    assert set(METHODS) - set(READ_PROMPTS) == learned


def test_settings_hold_the_texts_and_not_the_name_of_their_file(file, tmp_path):
    settings = TemplateSettings(prompts=file(OWN))
    (tmp_path / "own.json").unlink()
    assert settings.prompts == {name.replace("_", " "): texts for name, texts in OWN.items()}
    saved = json.loads(json.dumps(asdict(settings)))  # as a run keeps them
    assert TemplateSettings(**saved) == settings
    assert read_prompts(None) is read_prompts("") is None
    assert TemplateSettings("a {}").templates == ("a {}",)  # still its first field


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "own.json: cannot be read as JSON"),
        ([["rose"]], "own.json: is [['rose']], expected an object"),
        ({}, "own.json: names no class"),
        ({"rose": "a rose."}, "own.json: rose is 'a rose.', expected a list"),
        ({"rose": ["a rose.", 3]}, "own.json: rose.1 is 3, expected text"),
        ({"rose": []}, "own.json: rose has no text"),
        ({"rose": ["a."], " _ ": ["b."]}, "own.json: ' _ ' is not the name of a class"),
        ({"rose": ["a rose.", " "]}, "own.json: rose: ' ' is empty"),
        ({"tiger_lily": ["a."], "tiger lily": ["b."]}, "own.json: tiger lily occurs twice"),
        ('{"rose": ["a."], "rose": ["b."]}', "'rose' occurs twice"),
        ({"rose": ["word " * 80]}, "own.json: rose: word word"),
        ({"rose": ["{} " * 76]}, None),  # 76 times "rose", start and end are 78 tokens
        ({"rose": ["{} " * 75]}, "fits"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_class_and_text(content, said, file):
    path = file(content)
    if said == "fits":
        assert read_prompts(path)["rose"]
        return
    with pytest.raises(UserError, match="own.json") as error:
        read_prompts(path)
    assert (said or "is 78 tokens long") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no\.json: there is no such file; expected one"):
        TemplateSettings(prompts=str(tmp_path / "no.json"))


def test_classes_without_texts_are_named_with_what_may_be_meant(clip, file):
    path = file({"rose": ["a."], "ox eye daisy": ["b."], "fern": ["c."]})
    with pytest.raises(UserError) as error:
        new("zero_shot", clip, path)
    assert "no texts for red tulip, ox-eye daisy; every class" in str(error.value)
    some = new("zero_shot", clip, path, names=["rose"])
    with pytest.raises(UserError, match="did you mean ox-eye daisy by 'ox eye daisy'"):
        some.for_classes(["ox-eye daisy"])


def test_texts_that_no_class_reads_are_noted_with_the_nearest_name():
    prompts = {"rose": ["a."], "ox eye daisy": ["b."], "fern": ["c."]}
    (note,) = strangers(prompts, NAMES)
    assert "not classes: ox eye daisy (near ox-eye daisy), fern" in note
    assert strangers({"rose": ["a."]}, ["rose"]) == strangers({}, NAMES) == []


def test_without_prompts_zero_shot_is_as_before(clip, images):
    plain = ZeroShot.plain(clip, NAMES, TEMPLATE)
    text = naive(clip, [[TEMPLATE.format(name)] for name in NAMES])
    torch.testing.assert_close(F.normalize(plain.class_features(), dim=-1), text)
