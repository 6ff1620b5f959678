"""Names go to each library's and come back, and are exactly those its own model has."""

import open_clip.model
import pytest
import torch
import transformers
from oracle import SMALL, openai_clip

from clip_min import CLIP
from clip_min.names import to_hugging_face, to_openai_names, to_our_names


@pytest.fixture(scope="module")
def ours():
    return CLIP(SMALL).state_dict()


def hugging_face() -> transformers.CLIPModel:
    """One of SMALL's depths; its other sizes do not matter here."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        vision_config=tower | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
        text_config=tower | {"num_hidden_layers": 2, "vocab_size": 1000},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def ours_again(theirs: dict) -> dict:
    return dict(to_our_names(list(theirs), theirs.get))


@pytest.mark.parametrize("there", [to_hugging_face, to_openai_names])
def test_there_and_back_is_the_same(there, ours):
    assert equal(ours_again(there(ours)), ours)


@pytest.mark.parametrize(
    ("theirs", "there"),
    [
        (lambda: hugging_face().state_dict(), to_hugging_face),
        (lambda: openai_clip(SMALL).state_dict(), to_openai_names),
    ],
    ids=["Hugging Face", "OpenAI"],
)
def test_a_librarys_own_model_comes_here_and_goes_back_the_same(theirs, there):
    theirs = theirs()
    assert equal(there(ours_again(theirs)), theirs)


def test_open_clips_names_are_openais(ours):
    vision = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 3}
    text = {"vocab_size": 1000, "width": 64, "heads": 1, "layers": 2}
    model = open_clip.model.CLIP(32, vision, text)
    model.load_state_dict(to_openai_names(ours))  # strict


def test_no_two_of_our_names_become_one(ours):
    fused = [name for name in ours if ".in_proj." in name]
    assert len(to_hugging_face(ours)) == len(ours) + 2 * len(fused)
    assert len(to_openai_names(ours)) == len(ours)
