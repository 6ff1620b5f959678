"""LLaVA and Stable Diffusion, the libraries' real classes with few random weights."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from clip_min import UserError
from gen.caption import Llava, four_bits, sampler
from gen.diffuse import Diffusion
from gen.pretrained import locate
from gen.settings import Generation

NAMES = ["ox-eye daisy", "rose", "a flower with a rather long name"]
SEEDS = [3, 4, 5]
OPTIONS = Generation(caption_tokens=10)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (32, 32), (90, 50)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]


@pytest.fixture(scope="module")
def llava(tiny_llava) -> Llava:
    return Llava(str(tiny_llava), OPTIONS, "cpu")


@pytest.fixture(scope="module")
def diffusion(tiny_diffusion) -> Diffusion:
    return Diffusion(str(tiny_diffusion), OPTIONS, "cpu")


# ------------------------------------------------------------------------------------ captions


def test_the_prompt_is_the_models_own_format_and_names_the_class(llava):
    for name in NAMES:
        question = OPTIONS.question.replace("{}", name)
        assert llava.question(name) == f"USER: <image>\n{question} ASSISTANT:"
        assert name in question


def test_what_the_model_reads_has_the_class_name_the_first_too(llava, pictures, monkeypatch):
    read, real = [], llava.model.generate

    def spy(**inputs):
        read.extend(llava.processor.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return real(**inputs)

    monkeypatch.setattr(llava.model, "generate", spy)
    llava(pictures, NAMES, SEEDS)
    assert len(read) == 3
    assert all(name in text for name, text in zip(NAMES, read, strict=True))


def test_captions_of_a_batch_are_those_of_singles(llava, pictures):
    batch = llava(pictures, NAMES, SEEDS)
    singles = [llava([p], [n], [s])[0] for p, n, s in zip(pictures, NAMES, SEEDS, strict=True)]
    assert batch == singles
    assert len(set(batch)) == 3


def test_a_seed_repeats_a_caption_and_another_gives_another(llava, pictures):
    same = [pictures[0]] * 2, [NAMES[0]] * 2
    one, other = llava(*same, [7, 8]), llava(*same, [8, 7])
    assert one == other[::-1]
    assert len(set(one)) == 2


def test_picture_and_name_count(llava, pictures):
    one = llava([pictures[0]], [NAMES[0]], [1])
    assert llava([pictures[1]], [NAMES[0]], [1]) != one
    assert llava([pictures[0]], [NAMES[1]], [1]) != one


def test_at_temperature_0_the_caption_is_transformers_own_greedy_one(tiny_llava, pictures):
    options = Generation(caption_tokens=10, temperature=0)
    ours = Llava(str(tiny_llava), options, "cpu")([pictures[0]], [NAMES[0]], [1])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    processor = transformers.AutoProcessor.from_pretrained(tiny_llava)
    text = f"USER: <image>\n{options.question.format(NAMES[0])} ASSISTANT:"
    inputs = processor(images=[pictures[0]], text=[text], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ours == [" ".join(answer.split())]


def test_as_on_a_gpu_the_language_model_is_4_bit_and_the_image_tower_16(tiny_llava, pictures):
    captioner = Llava(str(tiny_llava), OPTIONS, "cpu")
    captioner.model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tiny_llava, dtype=torch.float16, quantization_config=four_bits(), device_map="cpu"
    )
    for name, layer in captioner.model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            four = name.startswith("model.language_model.layers.")
            assert layer.weight.dtype == (torch.uint8 if four else torch.float16), name
            assert (type(layer).__name__ == "Linear4bit") == four
    captions = captioner(pictures, NAMES, SEEDS)
    assert captions == captioner(pictures, NAMES, SEEDS)
    assert len(set(captions)) == 3


def test_another_kind_of_captioner_is_one_line(tiny_llava, tmp_path):
    config = json.loads((Path(tiny_llava) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    with pytest.raises(UserError, match="is a model of type 'llava_next', expected llava"):
        Llava(str(tmp_path), Generation(), "cpu")


def test_false_alarms_are_not_painted_black(tiny_diffusion, monkeypatch):
    kind = diffusers.AutoPipelineForImage2Image
    read = kind.from_pretrained

    def with_checker(*given, **options):
        pipe = read(*given, **options)
        pipe.safety_checker = torch.nn.Identity()
        return pipe

    monkeypatch.setattr(kind, "from_pretrained", with_checker)
    assert Diffusion(str(tiny_diffusion), OPTIONS, "cpu").pipe.safety_checker is None


def test_the_sampler_draws_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = [sampler([seed], 0.5)(None, logits).argmax().item() for seed in range(4000)]
    found = torch.tensor(drawn).bincount(minlength=4) / 4000
    torch.testing.assert_close(found, (logits[0] / 0.5).softmax(0), atol=0.025, rtol=0)


# ------------------------------------------------------------------------------------- images


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_images_of_a_batch_are_those_of_singles(diffusion, pictures):
    batch = as_array(diffusion(pictures, NAMES, SEEDS))
    singles = [diffusion([p], [n], [s])[0] for p, n, s in zip(pictures, NAMES, SEEDS, strict=True)]
    assert batch.shape == (3, 32, 32, 3)
    assert np.abs(batch - as_array(singles)).max() <= 1  # of 255: rounding
    assert np.abs(batch[0] - batch[1]).mean() > 5


def test_picture_prompt_and_seed_all_count(diffusion, pictures):
    one = as_array(diffusion(pictures[:1], ["rose"], [1]))
    assert np.array_equal(one, as_array(diffusion(pictures[:1], ["rose"], [1])))
    for picture, text, seed in [(1, "rose", 1), (0, "tulip", 1), (0, "rose", 2)]:
        other = as_array(diffusion([pictures[picture]], [text], [seed]))
        assert np.abs(one - other).mean() > 0.2  # of 255; weights are random


def test_the_recipe_is_the_published_one(diffusion, pictures, monkeypatch):
    given, steps = {}, []
    real = type(diffusion.pipe).__call__

    def spy(self, **options):
        given.update(options)
        count = lambda pipe, step, time, kept: (steps.append(step), kept)[1]  # noqa: E731
        return real(self, **options, callback_on_step_end=count)

    monkeypatch.setattr(type(diffusion.pipe), "__call__", spy)
    diffusion(pictures, NAMES, SEEDS)
    assert (given["strength"], given["num_inference_steps"]) == (15 / 20, 20)
    assert given["guidance_scale"] == 8
    assert len(steps) == 15  # of 20
    boxes = [(10, 0, 50, 40), (0, 0, 32, 32), (0, 20, 50, 70)]  # the middle square
    for square, picture, box in zip(given["image"], pictures, boxes, strict=True):
        assert square.size == (32, 32)
        assert square.tobytes() == picture.resize((32, 32), Image.Resampling.BICUBIC, box).tobytes()
    solver = diffusion.pipe.scheduler
    assert type(solver).__name__ == "DPMSolverMultistepScheduler"
    assert solver.config.algorithm_type == "dpmsolver++"
    assert (solver.config.beta_start, solver.config.beta_schedule) == (0.00085, "scaled_linear")


# -------------------------------------------------------------------------------- by name


def test_the_revision_of_a_folder_changes_with_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/w.bin").write_bytes(b"12")
    before = locate("--painter", str(tmp_path), None)
    assert before == locate("--painter", str(tmp_path), None)
    (tmp_path / "a/w.bin").write_bytes(b"13")
    assert locate("--painter", str(tmp_path), None)[1] != before[1]


def test_a_name_with_a_revision_is_downloaded_at_that_revision(
    tiny_llava, tiny_diffusion, monkeypatch
):
    asked = []

    def download(folder):
        def record(name, revision=None, **_):
            asked.append((name, revision))
            return str(folder)

        return record

    monkeypatch.setattr("huggingface_hub.snapshot_download", download(tiny_llava))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download(tiny_diffusion))
    for name in ("owner/model", "owner/model@0123abc"):
        Llava(name, OPTIONS, "cpu")
        Diffusion(name, OPTIONS, "cpu")
    assert asked == [("owner/model", None)] * 2 + [("owner/model", "0123abc")] * 2


@pytest.mark.parametrize("name", ["@", "a@b@c", "llava", "no/such/folder"])
def test_a_name_that_is_none_is_not_asked_for(name):
    with pytest.raises(UserError, match=f"^--painter {name}: expected a folder, or OWNER/NAME"):
        locate("--painter", name, None)


def test_a_model_neither_cached_nor_reachable_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for flag, make in (("--captioner", Llava), ("--painter", Diffusion)):
        with pytest.raises(UserError, match=f"{flag} nobody/nothing: neither a folder nor"):
            make("nobody/nothing", OPTIONS, "cpu")
