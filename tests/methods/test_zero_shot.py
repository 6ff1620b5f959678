"""Prompt ensembles: how templates are given, and that their mean is the naive one."""

import clip as openai_clip
import pytest
import torch
import torch.nn.functional as F
from published import openai_text_tower

from clip_min import UserError
from methods.templates import ENSEMBLE, TemplateSettings
from methods.zero_shot import ZeroShot

NAMES = ["rose", "red tulip", "ox-eye daisy", "a rather long name of a bird of paradise"]
TWO = ["a photo of a {}.", "{}, drawn by a child, {}"]


def naive(clip, templates, names) -> torch.Tensor:
    """Every padded prompt alone through openai-clip's text tower; on the sphere; mean; again."""
    tower = openai_text_tower(clip)
    rows = []
    for name in names:
        prompts = openai_clip.tokenize([t.replace("{}", name) for t in templates])
        units = [F.normalize(tower.encode_text(p[None])[0], dim=0) for p in prompts]
        rows.append(F.normalize(sum(units) / len(units), dim=0))
    return torch.stack(rows)


def zero_shot(clip, templates: str, template: str = "not used {}") -> ZeroShot:
    return ZeroShot(clip, NAMES, template, TemplateSettings(templates))


@pytest.fixture
def features(new_clip, images):
    with torch.no_grad():
        return new_clip().encode_image(images)


@pytest.mark.parametrize("source", ["ensemble", "inline", "file"])
def test_templates_average_over_the_sphere_as_the_naive_way_does(
    source, new_clip, features, tmp_path
):
    clip, lines, given = new_clip(), TWO, "|".join(TWO)
    if source == "ensemble":
        lines, given = ENSEMBLE, "ensemble"
    elif source == "file":
        given = str(tmp_path / "templates.txt")
        (tmp_path / "templates.txt").write_text("\n" + "\n\n  ".join(TWO) + "\n\n")
    method = zero_shot(clip, given)
    text = naive(clip, lines, NAMES)
    torch.testing.assert_close(F.normalize(method.class_features(), dim=-1), text)
    by_hand = clip.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T
    torch.testing.assert_close(method.classify(features), by_hand, atol=1e-4, rtol=1e-4)
    others = ["sweet pea", "rose"]
    assert method.for_classes(others).classify(features).shape == (5, 2)
    text = F.normalize(method.for_classes(others).class_features(), dim=-1)
    torch.testing.assert_close(text, naive(clip, lines, others))


def test_one_template_in_templates_equals_template(new_clip, features):
    clip = new_clip()
    one = zero_shot(clip, "a sketch of a {}.").classify(features)
    assert torch.equal(one, ZeroShot.plain(clip, NAMES, "a sketch of a {}.").classify(features))
    assert not torch.equal(one, ZeroShot.plain(clip, NAMES, "a photo of a {}.").classify(features))


def test_settings_hold_the_templates_and_not_the_name_of_their_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a photo of a {}.\n\n {} in a field \n")
    settings = TemplateSettings(str(file))
    file.unlink()
    assert settings.templates == ("a photo of a {}.", "{} in a field")
    assert TemplateSettings(list(settings.templates)) == settings  # as a saved run gives it back
    assert TemplateSettings("|".join(settings.templates)) == settings  # as older runs do
    assert len(TemplateSettings("ensemble").templates) == 20
    assert TemplateSettings().templates == TemplateSettings([]).templates == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as a text file"),  # no such file
        (b"\xff\xfe\x00{}", "cannot be read as a text file"),
        (b"", "expected templates, found none"),
        (b"\n  \n", "expected templates, found none"),
        (b"a {}\na flower\n", "'a flower' has no {}"),
        (b"a {} | a flower\n", "'a flower' has no {}"),  # | separates templates there too
    ],
)
def test_a_file_without_good_templates_is_one_line_that_says_so(content, said, tmp_path):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="--templates") as error:
        TemplateSettings(str(file))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_inline_templates_that_are_bad_are_one_line_too(tmp_path):
    with pytest.raises(UserError, match=r"--templates: 'a flower' has no \{\}"):
        TemplateSettings("a {}|a flower")
    with pytest.raises(UserError, match="cannot be read"):
        TemplateSettings(str(tmp_path))  # a folder


def test_a_template_for_every_class_keeps_the_order_of_templates_and_classes(new_clip):
    """As many templates as classes: nothing in the shapes would tell them apart."""
    clip = new_clip()
    templates = ["a {}", "the {} here", "{} {}", "no {}"]
    text = F.normalize(zero_shot(clip, "|".join(templates)).class_features(), dim=-1)
    torch.testing.assert_close(text, naive(clip, templates, NAMES))
