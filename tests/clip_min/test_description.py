"""What no tensor tells is read where it is written, and what nothing tells is said."""

import dataclasses
import json
import pathlib
import warnings

import open_clip
import pytest
import torch
import transformers
from oracle import SMALL, far

from clip_min import CLIP, CONFIGS, UserError, formats, load, save, tokenize
from clip_min.description import described, infer_config
from clip_min.errors import Note
from clip_min.names import to_openai_names

CLOSE = 1e-5
HF, OPEN, PROCESSOR = "config.json", "open_clip_config.json", "preprocessor_config.json"
P5 = "processor_config.json"  # of transformers 5
BARE = {"vision_config": {"num_attention_heads": 2}, "text_config": {"num_attention_heads": 1}}
GELU = {"vision_cfg": {}, "text_cfg": {"heads": 1}}
QUICK = {"model_cfg": GELU | {"quick_gelu": True}}


@pytest.fixture
def beside(tmp_path):
    """Files beside one of weights, its name -> (the config of that model, what is noted)."""

    def describe(files: dict, name: str = "model.safetensors"):
        for file, told in files.items():
            (tmp_path / file).write_text(json.dumps(told))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            config = described(SMALL, tmp_path / name, None, known=False)
        assert {warning.category for warning in said} <= {Note}
        return config, [str(warning.message) for warning in said]

    return describe


@torch.no_grad()
def test_heads_that_no_tensor_tells_are_read_beside_the_file(tmp_path):
    vision = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision |= {"intermediate_size": 256, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}
    text |= {"intermediate_size": 192, "vocab_size": 49408, "eos_token_id": 49407}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(Note, match="config.json beside it does not describe the preprocessing"):
        loaded = load(tmp_path / "model.safetensors")
    assert (loaded.config.vision_heads, loaded.config.text_heads) == (4, 6)
    images, tokens = torch.randn(2, 3, 32, 32), tokenize(["a rose", "a red tulip"])
    expected = model(pixel_values=images, input_ids=tokens).logits_per_image
    assert far(loaded(images, tokens), expected) < CLOSE


@pytest.mark.parametrize("save_folder", [formats.save_hugging_face, formats.save_open_clip])
def test_what_we_export_is_read_as_the_model_it_was(save_folder, tmp_path):
    save_folder(load("demo"), tmp_path / "demo")  # whose heads are 32 wide
    (file,) = (tmp_path / "demo").glob("*.safetensors")
    assert load(file).config == CONFIGS["demo"]


INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        ({OPEN: {"model_cfg": GELU}}, {"activation": "gelu"}),
        ({OPEN: {"model_cfg": GELU | {"quick_gelu": False}}}, {"activation": "gelu"}),
        (
            {OPEN: {"model_cfg": QUICK["model_cfg"] | {"vision_cfg": {"head_width": 32}}}},
            {"vision_heads": 4},
        ),
        (
            {HF: BARE | {"vision_config_dict": {"num_attention_heads": 4}}},  # which counts
            {"vision_heads": 4},
        ),
        (
            {HF: {key: of | {"hidden_act": "gelu"} for key, of in BARE.items()}},
            {"activation": "gelu"},
        ),
        ({OPEN: QUICK | {"preprocess_cfg": {"mean": [0.5] * 3, "std": 0.5}}}, INCEPTION),
        ({OPEN: QUICK | {"preprocess_cfg": {"resize_mode": "squash"}}}, {"resize": "squash"}),
        ({OPEN: QUICK | {"preprocess_cfg": {"interpolation": "random"}}}, {}),
        (
            {OPEN: QUICK | {"preprocess_cfg": {"interpolation": "bilinear"}}},
            {"interpolation": "bilinear"},
        ),
        ({HF: BARE, PROCESSOR: {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}, INCEPTION),
        ({HF: BARE, PROCESSOR: {"resample": 2}}, {"interpolation": "bilinear"}),
        ({PROCESSOR: {"size": SQUARE, "do_center_crop": False}}, {"resize": "squash"}),
        ({HF: BARE, PROCESSOR: {"size": SQUARE, "crop_size": SQUARE}}, {"resize": "squash"}),
        (  # as transformers writes it, whose crop_size is not used
            {PROCESSOR: {"size": SQUARE, "do_center_crop": False, "crop_size": {"height": 224}}},
            {"resize": "squash"},
        ),
        (
            {HF: BARE, P5: {"image_processor": {"image_mean": [0.5] * 3, "image_std": 0.5}}},
            INCEPTION,
        ),
        ({P5: {"image_processor": {"resample": 2}}, PROCESSOR: {}}, {"interpolation": "bilinear"}),
        (
            {P5: {"processor_class": "CLIPProcessor"}, PROCESSOR: {"resample": 2}},
            {"interpolation": "bilinear"},
        ),
        # OpenAI's own way in other words.
        ({OPEN: QUICK | {"preprocess_cfg": {"size": [32, 32]}}}, {}),
        ({OPEN: QUICK | {"preprocess_cfg": {"std": [0.2686, 0.2613, 0.2758]}}}, {}),
        ({OPEN: QUICK | {"preprocess_cfg": None}}, {}),
        ({PROCESSOR: {"size": 32, "crop_size": 32}}, {}),
    ],
)
def test_what_a_description_tells(files, changed, beside):
    assert beside(files)[0] == dataclasses.replace(SMALL, **changed)


@pytest.mark.parametrize(
    ("file", "told", "said"),
    [
        (HF, BARE | {"vision_config": {"num_attention_heads": 7}}, "heads, 7 and 1, do"),
        (HF, BARE | {"vision_config": {"num_attention_heads": 0}}, "heads, 0 and 1, do"),
        (HF, BARE | {"vision_config": {"num_attention_heads": -2}}, "heads, -2 and"),
        (HF, BARE | {"vision_config": {"num_attention_heads": 2.0}}, "is 2.0, expected"),
        (HF, BARE | {"vision_config": {"num_attention_heads": True}}, "is True, exp"),
        (HF, {"vision_config": {}}, "text_config is missing"),
        (HF, {"vision_config": None, "text_config": None}, "vision_config is None, expected an"),
        (
            HF,
            BARE | {"vision_config": {"hidden_act": "gelu"}},
            "the activation is 'gelu and quick_gelu'",
        ),
        (
            HF,
            BARE | {"text_config": {"hidden_act": "relu"}},
            "the activation is 'quick_gelu and relu'",
        ),
        (HF, BARE | {"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06, but"),
        (OPEN, {"model_cfg": GELU | {"vision_cfg": {"head_width": 0}}}, "heads, 0 and 1"),
        (OPEN, {"model_cfg": GELU | {"vision_cfg": {"head_width": 60}}}, "heads, 0 and 1"),
        (OPEN, {"model_cfg": GELU | {"text_cfg": []}}, r"text_cfg is \[\], expected an"),
        (OPEN, {"model_cfg": GELU | {"quick_gelu": 1}}, "quick_gelu is 1, expected true or"),
        (OPEN, {"model_cfg": 3}, "model_cfg is 3, expected an object"),
        (OPEN, QUICK | {"preprocess_cfg": {"resize_mode": "longest"}}, "resize is 'longest', but"),
        (OPEN, QUICK | {"preprocess_cfg": {"interpolation": "lanczos"}}, "interpolation is 'lan"),
        (OPEN, QUICK | {"preprocess_cfg": {"size": 48}}, "size is 48, but"),
        (OPEN, QUICK | {"preprocess_cfg": {"std": [1, 0, 1]}}, "three numbers above 0"),
        (OPEN, QUICK | {"preprocess_cfg": {"mean": [1, 0]}}, "three numbers above 0"),
        (PROCESSOR, {"image_std": [1, 1, "x"]}, "std.2 is 'x', expected a finite number"),
        (PROCESSOR, {"resample": 1}, "resample is 1, but"),
        (PROCESSOR, {"do_center_crop": False}, "do_center_crop is False, but"),
        (PROCESSOR, {"rescale_factor": 1}, "rescale_factor is 255, but"),
        (PROCESSOR, {"rescale_factor": "x"}, "rescale_factor is 'x', expected a finite number"),
        (PROCESSOR, {"do_normalize": False}, "do_normalize is False, but"),
        (PROCESSOR, {"size": {"shortest_edge": 36}}, "size is {'shortest_edge': 36}, but"),
        (PROCESSOR, {"crop_size": {"height": 24, "width": 24}}, "crop_size is"),
    ],
)
def test_what_cannot_be_or_cannot_be_computed_is_named(file, told, said, beside):
    with pytest.raises(UserError, match=f"{file}: .*{said}") as error:
        beside({file: told})
    assert str(error.value).isprintable()


PLAIN = {"B-16", "B-16-plus", "B-16-plus-240", "B-32", "B-32-256", "B-32-plus-256", "H-14", "H-16"}
PLAIN |= {"H-14-378", "L-14", "L-14-280", "L-14-336", "L-16", "L-16-320", "M-16", "M-32", "S-16"}
PLAIN |= {"M-32-alt", "S-16-alt", "S-32", "S-32-alt"}


@pytest.mark.parametrize("name", open_clip.list_models())
def test_of_open_clips_models_those_of_this_architecture_are_taken(name, beside):
    """Their configs; at the size of SMALL where they are taken, for the sizes are the tensors'."""
    model = open_clip.get_model_config(name)
    if name.startswith("ViT-") and name[4:].removesuffix("-quickgelu") in PLAIN:
        model["text_cfg"]["heads"] = 1
        model["vision_cfg"]["head_width"] = 64
        quick = name.endswith("-quickgelu")
        config = dataclasses.replace(SMALL, activation="quick_gelu" if quick else "gelu")
        assert beside({OPEN: {"model_cfg": model}})[0] == config
    else:
        with pytest.raises(UserError, match=f"{OPEN}: .* another architecture"):
            beside({OPEN: {"model_cfg": model}})


@pytest.mark.parametrize(
    "config", [transformers.SiglipConfig, transformers.ChineseCLIPConfig, transformers.ViTConfig]
)
def test_hugging_faces_other_models_are_refused(config, tmp_path, beside):
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{HF}: model_type is '{config.model_type}': another"):
        beside({})


@pytest.mark.parametrize("model", ["ViT-g-14", "ViT-bigG-14"])
def test_tensors_of_a_tower_with_wider_mlps_are_refused(model):
    """Told by the tensors alone; their widths, in one block."""
    sizes = open_clip.get_model_config(model)["vision_cfg"]
    width, hidden = sizes["width"], int(sizes["width"] * sizes["mlp_ratio"])
    with torch.device("meta"):
        config = dataclasses.replace(SMALL, vision_width=width, vision_heads=16, vision_layers=1)
        state = CLIP(config).state_dict()
        state["visual.transformer.resblocks.0.mlp.c_fc.bias"] = torch.zeros(hidden)
    with pytest.raises(ValueError, match=f"{hidden} wide, .*ViT-g/14 and ViT-bigG/14"):
        infer_config(state)


def test_heads_without_a_value_are_those_of_transformers(beside, tmp_path):
    width = {"hidden_size": 384, "num_hidden_layers": 1, "intermediate_size": 1536}
    vision = width | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, text_config=width | {"vocab_size": 1000})
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    told = json.loads((tmp_path / HF).read_text())
    for tower in ("vision", "text"):
        told[f"{tower}_config"].pop("num_attention_heads", None)  # as older versions leave it out
    (tmp_path / HF).write_text(json.dumps(told))
    ours = load(tmp_path / "model.safetensors").config
    theirs = transformers.CLIPConfig.from_pretrained(tmp_path)
    heads = theirs.vision_config.num_attention_heads, theirs.text_config.num_attention_heads
    assert (ours.vision_heads, ours.text_heads) == heads == (12, 8)


@torch.no_grad()
def test_a_whole_processor_of_transformers_is_read(tmp_path):
    formats.save_hugging_face(load("demo"), tmp_path / "demo")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "demo")
    processor.image_processor.image_mean = [0.5, 0.4, 0.3]
    (tmp_path / "demo/preprocessor_config.json").unlink()
    processor.save_pretrained(tmp_path / "demo")
    loaded = load(tmp_path / "demo/model.safetensors")
    assert loaded.config.mean == (0.5, 0.4, 0.3)


def test_a_description_of_another_model_beside_is_noted(beside):
    files = {OPEN: {"model_cfg": GELU}, HF: {"model_type": "siglip", "vision_config": {}}}
    config, notes = beside(files, "open_clip_model.safetensors")
    assert config == dataclasses.replace(SMALL, activation="gelu")
    assert "config.json describes another model; open_clip_config.json beside it is" in notes[0]
    with pytest.raises(UserError, match="model_type is 'siglip'"):
        beside(files, "model.safetensors")


def test_what_nothing_tells_is_said(beside):
    (note,) = beside({HF: {"method": "lora", "settings": {}}})[1]  # a config of something else
    assert "no config.json or open_clip_config.json beside it describes the model" in note
    assert (
        "QuickGELU and heads 64 wide are assumed; OpenAI's preprocessing of images is assumed"
        in note
    )
    (note,) = beside({PROCESSOR: {}})[1]
    assert "heads 64 wide are assumed;" in note
    assert beside({HF: BARE})[1] == []
    (note,) = beside({HF: {}, OPEN: QUICK})[1]
    assert "open_clip_config.json beside it does not describe the preprocessing" in note
    assert beside({})[1] == []  # said
    wide = dataclasses.replace(SMALL, vision_width=1280, vision_heads=20)
    with pytest.warns(Note, match="heads 80 wide"):
        assert described(wide, tmp := pathlib.Path("a.pt"), None, known=False).vision_heads == 16
    assert described(wide, tmp, None, known=True) == wide


def test_of_two_descriptions_the_one_that_belongs_to_the_file_is_followed(beside):
    files = {OPEN: {"model_cfg": GELU}, HF: BARE, PROCESSOR: {"image_mean": 0.5}}
    config, (note, _) = beside(files, "open_clip_model.safetensors")
    assert config == dataclasses.replace(SMALL, activation="gelu")
    assert (
        "config.json beside it differ in activation; open_clip_config.json is used, which" in note
    )
    config, (note,) = beside(files | {OPEN: {"model_cfg": GELU, "preprocess_cfg": {}}})
    assert config == dataclasses.replace(SMALL, mean=(0.5, 0.5, 0.5))
    assert "differ in activation, mean; config.json is used, which belongs to this file" in note


def test_a_folder_of_hugging_faces_or_open_clips_is_read_in_silence(tmp_path):
    for save_folder in (formats.save_hugging_face, formats.save_open_clip):
        folder = tmp_path / save_folder.__name__
        save_folder(load("demo"), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(folder).config == CONFIGS["demo"]


def test_what_a_lone_file_does_not_tell_is_said_once(tmp_path):
    torch.save(to_openai_names(CLIP(SMALL).state_dict()), tmp_path / "lone.pt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            load(tmp_path / "lone.pt")
    assert [warning.category for warning in said] == [Note]


def test_our_own_header_tells_it_all_and_an_old_one_means_openais(tmp_path):
    odd = dict(activation="gelu", resize="squash", interpolation="bilinear", **INCEPTION)
    for told in ({}, odd):
        config = dataclasses.replace(SMALL, vision_heads=4, **told)
        save(CLIP(config), tmp_path / "ours.safetensors")
        assert load(tmp_path / "ours.safetensors").config == config
    old = {"vision_heads": 4, "text_heads": 1}
    for told, said in (
        ({"activation": "relu"}, "the activation is 'relu'"),
        ({"mean": [1]}, "three numbers"),
        ({"resize": "none"}, "resize is 'none'"),
        ({"std": "x"}, "std.0 is 'x'"),
        ({"activation": []}, r"activation is \[\], expected text"),
    ):
        with pytest.raises(UserError, match=f"a: its header: .*{said}"):
            described(SMALL, pathlib.Path("a"), json.dumps(old | told), known=False)
    header = json.dumps(old | {"foo_heads": 3, "other": 1})  # what is not known is not read
    config = described(SMALL, pathlib.Path("a"), header, known=False)
    assert config == dataclasses.replace(SMALL, vision_heads=4)
