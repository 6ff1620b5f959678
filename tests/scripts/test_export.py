"""What a run becomes elsewhere: the real libraries load it and compute our logits."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import clip_min
from clip_min import CLIP, CLIPConfig
from fewshot.run import Run
from methods import METHODS, Method
from methods.templates import ENSEMBLE

BASE = ["amber lily", "blue bell", "cyan lotus"]
NOVEL = ["dark iris", "egg flower"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Whole(Method):
    """Learns a weight in each tower of CLIP itself, as full fine-tuning does all of them."""

    Settings = METHODS["lora"].Settings
    first_block, text_learns = 0, True

    def __init__(self, clip, *rest):
        super().__init__(clip, *rest)
        for weight in (self.clip.visual.proj, self.clip.text_projection):
            weight.data = weight.data.clone()  # not the lent CLIP's
            weight.requires_grad_(True)


@pytest.fixture(scope="module", autouse=True)
def whole_is_a_method():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "whole", Whole)
        yield


@pytest.fixture(scope="module")
def model64(tmp_path_factory) -> Path:
    """The file of a tiny CLIP whose heads are 64 wide, as OpenAI's are."""
    path = tmp_path_factory.mktemp("model") / "tiny64.safetensors"
    torch.manual_seed(0)
    clip_min.save(CLIP(CLIPConfig(32, 32, 8, 64, 2, 1, 64, 2, 1)), path)
    return path


RUNS = {
    "lora": (),
    "lora on all": ("--parts", "qkvo", "--blocks", 1, "--scaling", "sqrt"),
    "whole": ("--method", "whole"),
    "coop": ("--method", "coop"),
    "cocoop": ("--method", "cocoop"),
    "coop of its classes": ("--method", "coop", "--class-specific"),
    "zero_shot": ("--method", "zero_shot"),
    "templates": ("--method", "zero_shot", "--templates", "ensemble"),
    "linear_probe": ("--method", "linear_probe"),
    "cross_modal": ("--method", "cross_modal"),
    "lp_plus_plus": ("--method", "lp_plus_plus"),
    "two_stage": ("--method", "two_stage", "--keep", "last"),
}


@pytest.fixture(scope="module")
def runs(script, data, model64, tmp_path_factory) -> dict[str, Path]:
    """A short training of each."""
    found = {}
    for name, flags in RUNS.items():
        out = tmp_path_factory.mktemp("runs")
        common = ("--dataset", "folder", "--data-root", data, "--model", model64, "--shots", 2)
        closed = ("zero_shot", "templates", "linear_probe", "lp_plus_plus")  # without epochs
        short = () if name in closed else ("--epochs", 2, "--lr", 0.02)
        tuned = name.startswith("lora") or name == "whole"
        ranks = ("--image-rank", 4, "--text-rank", 3, "--dropout", 0) if tuned else ()
        method = ("--method", "lora") if name.startswith("lora") else ()
        flags = (*method, *common, *short, *ranks, *flags, "--out", out)
        result = script("train", *flags)
        assert result.code == 0, result.err
        (found[name],) = out.glob("*/*/*")
    return found


@torch.no_grad()
def our_logits(run: Path, classnames: list[str], images=IMAGES) -> torch.Tensor:
    """By the method, as its training left it: nothing merged, nothing exported."""
    config = json.loads((run / "config.json").read_text())
    kind = METHODS[config["method"]]
    clip = clip_min.load(config["experiment"]["model"])
    learned = config["classnames"]["base"]
    method = kind(clip, learned, "a photo of a {}.", kind.Settings(**config["settings"]))
    method.load_adapter(Run.open(run).load_adapter())
    method.eval()
    method = method if classnames == learned else method.for_classes(classnames)
    return method(images)


def tokens(classnames: list[str]) -> torch.Tensor:
    return clip_min.tokenize([f"a photo of a {name}." for name in classnames])


def by_clip_min(out):
    return clip_min.load(out)(IMAGES, tokens(BASE))


def by_openai(out):
    import clip.model

    state = load_file(out)
    model = clip.model.build_model(dict(state)).float()
    model.load_state_dict(state)
    return model(IMAGES, tokens(BASE))[0]


def by_transformers(out):
    import transformers

    model = transformers.CLIPModel.from_pretrained(out).eval()
    ids = transformers.CLIPProcessor.from_pretrained(out)(
        text=[f"a photo of a {name}." for name in BASE], padding=True, return_tensors="pt"
    )
    return model(pixel_values=IMAGES, **ids).logits_per_image


def by_open_clip(out):
    import open_clip

    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    image, text, scale = model.eval()(IMAGES, tokens(BASE))
    return scale * image @ text.T


FORMATS = {
    "safetensors": (by_clip_min, "out.safetensors"),
    "openai": (by_openai, "out.safetensors"),
    "huggingface": (by_transformers, "out"),
    "open_clip": (by_open_clip, "out"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["lora", "lora on all", "whole", "zero_shot"])
@torch.no_grad()
def test_a_merged_clip_gives_our_logits_in_its_own_library(name, form, script, runs, tmp_path):
    load, out = FORMATS[form]
    out = tmp_path / out
    result = script("export", "--run", runs[name], "--format", form, out)
    assert (result.code, result.err) == (0, "")
    assert str(out) in result.out
    expected = our_logits(runs[name], BASE)
    torch.testing.assert_close(load(out), expected, atol=1e-4, rtol=0)
    if name != "zero_shot":
        zero_shot = our_logits(runs["zero_shot"], BASE)
        assert not torch.allclose(expected, zero_shot, atol=0.01)  # it has learned something


@torch.no_grad()
def test_a_two_stage_clip_leaves_its_classifier_to_the_other_form_and_says_so(
    script, runs, tmp_path
):
    out = tmp_path / "out.safetensors"
    result = script("export", "--run", runs["two_stage"], "--format", "safetensors", out)
    assert (result.code, result.err) == (0, "")
    assert "note: this classifies by prompts only; the learned rows" in result.out
    clip, novel = clip_min.load(out), our_logits(runs["two_stage"], NOVEL)
    torch.testing.assert_close(clip(IMAGES, tokens(NOVEL)), novel, atol=1e-4, rtol=0)
    base = our_logits(runs["two_stage"], BASE)
    assert not torch.allclose(clip(IMAGES, tokens(BASE)), base, atol=1e-3)


@torch.no_grad()
def test_open_clip_takes_the_file_by_the_name_of_its_size(script, runs, tmp_path, monkeypatch):
    import open_clip

    script("export", "--run", runs["lora"], "--format", "open_clip", tmp_path / "out")
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    file = tmp_path / "out/open_clip_model.safetensors"
    image, text, scale = open_clip.create_model("tiny", pretrained=str(file)).eval()(
        IMAGES, tokens(BASE)
    )
    expected = our_logits(runs["lora"], BASE)
    torch.testing.assert_close(scale * image @ text.T, expected, atol=1e-4, rtol=0)


def test_transformers_tokens_and_pixels_are_ours(script, runs, data, tmp_path):
    import transformers
    from PIL import Image

    script("export", "--run", runs["lora"], "--format", "huggingface", tmp_path / "out")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    texts = ["A lily-valley's café", "102 ROSES & 1/2", "it'll   do", "🌹"]
    ids = torch.tensor(processor(text=texts, padding="max_length")["input_ids"])
    ours = clip_min.tokenize(texts)
    ends = ours.argmax(dim=-1)
    for mine, other, end in zip(ours, ids, ends.tolist(), strict=True):
        assert torch.equal(mine[: end + 1], other[: end + 1])
    image = Image.open(data / "test/blue-bell/0.png").resize((64, 96))  # they round odd sizes up
    found = processor(images=image, return_tensors="pt")["pixel_values"][0]
    pixels = clip_min.normalize(clip_min.crop(image, 32))
    torch.testing.assert_close(found, pixels, atol=0.016, rtol=0)  # one of 256 levels


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "lora on all"])
def test_a_peft_adapter_gives_our_logits_on_the_untuned_clip(name, script, runs, tmp_path):
    import peft
    import transformers

    script("export", "--run", runs["zero_shot"], "--format", "huggingface", tmp_path / "base")
    result = script("export", "--run", runs[name], "--format", "peft", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = transformers.CLIPModel.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    found = model(pixel_values=IMAGES, input_ids=tokens(BASE)).logits_per_image
    torch.testing.assert_close(found, our_logits(runs[name], BASE), atol=1e-4, rtol=0)


def test_a_peft_adapter_names_its_base_only_at_the_size_that_this_was_trained_with(
    script, runs, data, model64, tmp_path, monkeypatch
):
    """At another size, the model of that name has other positions, and other logits."""
    monkeypatch.setitem(importlib.import_module("export").HUGGING_FACE, str(model64), "openai/b")
    flags = ["--method", "lora", "--dataset", "folder", "--data-root", data, "--model", model64]
    flags += ["--shots", 2, "--epochs", 0, "--image-size", 48, "--out", tmp_path / "runs"]
    assert script("train", *flags).code == 0
    (larger,) = (tmp_path / "runs").glob("*/*/*")
    for run, named in ((runs["lora"], True), (larger, False)):
        out = tmp_path / f"out{named}"
        result = script("export", "--run", run, "--format", "peft", out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == ("openai/b" if named else None)
        assert ("openai/b" in result.out) == named


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("coop", None, BASE + NOVEL),
        ("coop", "sea, a red {} thing", ["sea", "a red {} thing"]),
        ("coop", "a file", ["sea, or lake", "rose"]),
        ("coop of its classes", None, BASE),
        ("cross_modal", None, BASE),
        ("lp_plus_plus", None, BASE),
        ("zero_shot", None, BASE + NOVEL),
        ("lora", "egg flower,rose", ["egg flower", "rose"]),
        ("whole", None, BASE + NOVEL),
        ("two_stage", None, BASE + NOVEL),
    ],
)
@torch.no_grad()
def test_a_classifier_is_one_product_with_the_image_features(
    name, classes, expected, script, runs, tmp_path, model64
):
    out = tmp_path / "out.safetensors"
    (tmp_path / "names.txt").write_text("sea, or lake\nrose\n")
    classes = tmp_path / "names.txt" if classes == "a file" else classes
    flags = ("--classes", classes) if classes else ()
    result = script("export", "--run", runs[name], "--format", "classifier", *flags, out)
    assert (result.code, result.err) == (0, "")
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["clip_min"])
        weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")
    assert header["classnames"] == expected
    assert header["template"] == "a photo of a {}."
    assert weight.shape == (len(expected), 32)
    tuned = name in ("lora", "whole", "two_stage")
    assert header["image_tower"] == ("tuned" if tuned else "as it is")
    assert ("take image features from a merged export" in result.out) == tuned
    source = model64
    if tuned:
        source = tmp_path / "merged.safetensors"
        script("export", "--run", runs[name], "--format", "safetensors", source)
    features = nn.functional.normalize(clip_min.load(source).encode_image(IMAGES), dim=-1)
    torch.testing.assert_close(
        scale * features @ weight.T, our_logits(runs[name], expected), atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_a_linear_probe_is_a_product_with_the_features_as_they_are_and_a_bias(
    script, runs, tmp_path, model64
):
    out = tmp_path / "out.safetensors"
    result = script("export", "--run", runs["linear_probe"], "--format", "classifier", out)
    assert (result.code, result.err) == (0, "")
    tensors, features = load_file(out), clip_min.load(model64).encode_image(IMAGES)
    found = nn.functional.linear(features, **tensors)  # weight and bias, and no scale
    torch.testing.assert_close(found, our_logits(runs["linear_probe"], BASE), atol=1e-4, rtol=0)
    names = {"file": safe_open(out, "pt"), "image_features": features}
    (shown,) = [line for line in result.out.splitlines() if line.startswith("logits = ")]
    torch.testing.assert_close(eval(shown.removeprefix("logits = "), names), found)


def header(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["clip_min"])


def test_every_form_tells_the_names_and_the_template(script, runs, tmp_path):
    import transformers

    names, template = BASE + NOVEL, "a photo of a {}."
    for form, out in [(form, out) for form, (_, out) in FORMATS.items()] + [("peft", "out")]:
        folder = tmp_path / form
        folder.mkdir()
        assert script("export", "--run", runs["lora"], "--format", form, folder / out).code == 0
    for told in (
        header(tmp_path / "safetensors/out.safetensors"),
        header(tmp_path / "openai/out.safetensors"),
        header(tmp_path / "peft/out/adapter_model.safetensors"),
        json.loads((tmp_path / "open_clip/out/open_clip_config.json").read_text()),
    ):
        assert (told["classnames"], told["template"]) == (names, template)
    config = transformers.CLIPModel.from_pretrained(tmp_path / "huggingface/out").config
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: label for label, name in enumerate(names)}
    assert config.template == template
    several = tmp_path / "several.safetensors"
    script("export", "--run", runs["templates"], "--format", "safetensors", several)
    assert header(several)["template"] == "|".join(ENSEMBLE)


# -------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("cocoop", "classifier", "CoCoOp has no classifier matrix"),
        ("cocoop", "huggingface", "it learns context"),
        ("coop", "safetensors", "CoOp is more than a CLIP with other weights: it learns context"),
        ("coop", "peft", "--format peft needs a LoRA, and CoOp is none"),
        ("whole", "peft", "--format peft needs a LoRA, and Whole is none"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line(
    name, form, said, script, runs, tmp_path, is_one_line
):
    out = tmp_path / ("out" if form in ("peft", "huggingface") else "out.safetensors")
    assert is_one_line(script("export", "--run", runs[name], "--format", form, out), said)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_openai_clip_does_not_compute_are_one_line(
    script, trained, tmp_path, is_one_line
):
    out = tmp_path / "out.safetensors"
    result = script("export", "--run", trained.path, "--format", "openai", out)
    assert is_one_line(result, "heads 64 wide", "2 heads 32 wide")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--format", "peft", "out"], "--run DIR is missing"),
        (["--run", "x", "out"], "--format FORMAT is missing"),
        (["--run", "x", "--format", "peft"], "OUT is missing"),
        (["--run", "x", "--format", "pefd", "out"], "--format pefd: unknown; did you mean peft"),
        (["--run", "x", "--format", "onnx", "out"], "--format onnx: unknown"),
        (["--run", "x", "--format", "peft", "out.safetensors"], "peft writes a folder"),
        (["--run", "x", "--format", "openai", "out.pt"], "openai writes a file, NAME.safetensors"),
        (
            ["--run", "x", "--format", "peft", "--classes", "a", "out"],
            "works only with --format classifier",
        ),
        (["--run", "nowhere", "--format", "peft", "out"], "nowhere/config.json: there is no such"),
        (["--rum", "x"], "unknown argument --rum; did you mean --run"),
    ],
)
def test_wrong_flags_are_one_line(argv, said, script, tmp_path, monkeypatch, is_one_line):
    monkeypatch.chdir(tmp_path)
    assert is_one_line(script("export", *argv), said)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_left_alone(script, runs, tmp_path, is_one_line):
    for form, out in (("peft", tmp_path / "out"), ("openai", tmp_path / "o.safetensors")):
        out.write_text("precious")
        result = script("export", "--run", runs["lora"], "--format", form, out)
        assert is_one_line(result, f"{out}: exists already")
        assert out.read_text() == "precious"


def test_another_model_and_no_classes_are_one_line(script, runs, new_model, tmp_path, is_one_line):
    common = ("export", "--run", runs["lora"], "--format")
    result = script(*common, "peft", "--model", new_model(1), tmp_path / "out")
    assert is_one_line(result, "fingerprint", "--model")
    out = tmp_path / "out.safetensors"
    assert is_one_line(script(*common, "classifier", "--classes", " , ", out), "names 0 classes")
    assert is_one_line(script(*common, "classifier", "--classes", "a,b,a", out), "'a' and 'a' are")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(script, runs, tmp_path, monkeypatch, is_one_line):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clip_min.formats.write_text", full)
    result = script("export", "--run", runs["lora"], "--format", "huggingface", tmp_path / "out")
    assert is_one_line(result, str(tmp_path / "out"), "No space left")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- the way back in


def test_an_adapter_written_for_peft_starts_a_run_as_the_run_itself_does(
    script, runs, data, model64, tmp_path, is_one_line
):
    """With no epoch of training: the table and the adapter are the first run's."""
    script("export", "--run", runs["lora"], "--format", "peft", tmp_path / "peft")
    flags = ["--method", "lora", "--dataset", "folder", "--data-root", data, "--model", model64]
    flags += ["--shots", 2, "--epochs", 0]
    ranks = ["--image-rank", 4, "--text-rank", 3]
    for name, source in (("a", runs["lora"]), ("b", tmp_path / "peft")):
        out = tmp_path / name
        result = script("train", *flags, *ranks, "--init-from", source, "--out", out)
        assert result.code == 0, result.err
        (run,) = out.glob("*/*/*")
        assert (run / "adapter.safetensors").read_bytes() == (
            runs["lora"] / "adapter.safetensors"
        ).read_bytes()
        assert json.loads((run / "config.json").read_text())["init_from"] == str(source)
        found = [
            json.loads((path / "results.json").read_text())["parts"] for path in (run, runs["lora"])
        ]
        assert found[0] == found[1]
    out = tmp_path / "c"
    result = script("train", *flags, "--init-from", tmp_path / "peft", "--out", out)
    assert is_one_line(result, f"--init-from {tmp_path / 'peft'}: ", "--image-rank 4 --text-rank 3")
    assert not out.exists()  # a mistake leaves no folder
    result = script("train", *flags, "--init-from", tmp_path / "nowhere", "--out", out)
    assert is_one_line(result, "there is no such folder or file")


def test_a_run_from_an_adapter_goes_on_with_the_same_flag(
    script, runs, data, model64, tmp_path, is_one_line
):
    flags = ["--method", "lora", "--dataset", "folder", "--data-root", data, "--model", model64]
    flags += ["--shots", 2, "--epochs", 1, "--image-rank", 4, "--text-rank", 3, "--out", tmp_path]
    start = ("--init-from", runs["lora"])
    assert script("train", *flags, *start).code == 0
    (run,) = tmp_path.glob("*/*/*")
    adapter = (run / "adapter.safetensors").read_bytes()
    assert is_one_line(script("train", *flags, "--resume"), "init_from")
    assert script("train", *flags, *start, "--resume").code == 0
    assert (run / "adapter.safetensors").read_bytes() == adapter


# ------------------------------------------------------------------------------------- full size


@pytest.mark.slow
@torch.no_grad()
def test_vit_b_16_of_full_size_in_every_library(tmp_path):
    from clip_min import CONFIGS, formats
    from methods.interop.plain_weights import merged_clip

    torch.manual_seed(0)
    clip = CLIP(CONFIGS["ViT-B/16"]).eval()
    kind = METHODS["lora"]
    lora = kind(clip, ["rose", "tulip"], "a photo of a {}.", kind.Settings()).eval()
    for tensor in lora.adapter_state().values():
        nn.init.normal_(tensor, std=0.02)
    images, ids = torch.randn(2, 3, 224, 224), tokens(["rose", "tulip"])
    expected = lora(images)
    merged = merged_clip(lora)
    close = {"atol": 1e-4, "rtol": 0}

    import clip.model
    import open_clip
    import transformers

    formats.save_openai(merged, tmp_path / "openai/out.safetensors")
    state = load_file(tmp_path / "openai/out.safetensors")
    model = clip.model.build_model(dict(state)).float()
    model.load_state_dict(state)
    torch.testing.assert_close(model(images, ids)[0], expected, **close)
    formats.save_hugging_face(merged, tmp_path / "hf")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    found = model(pixel_values=images, input_ids=ids).logits_per_image
    torch.testing.assert_close(found, expected, **close)
    formats.save_open_clip(merged, tmp_path / "oc")
    file = str(tmp_path / "oc/open_clip_model.safetensors")
    model = open_clip.create_model("ViT-B-16-quickgelu", pretrained=file).eval()
    image, text, scale = model(images, ids)
    torch.testing.assert_close(scale * image @ text.T, expected, **close)
