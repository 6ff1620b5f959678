"""Weights from every library's files arrive whole and equal, and bad files never do."""

import copy
import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import clip
import clip.clip
import clip.model
import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP as OpenClip
from open_clip.model import CustomTextCLIP
from oracle import SMALL, assert_holds, convert, far, random_tokens, renamed, same_in_ours
from safetensors.torch import load_file, save_file

from clip_min import (
    CLIP,
    CONFIGS,
    CLIPConfig,
    UserError,
    description,
    hub,
    load,
    save,
    weights,
)
from clip_min.errors import Note
from clip_min.files import remove_half_written
from clip_min.names import to_hugging_face, to_openai_names
from clip_min.pickled import read_pickled

CLOSE = 1e-5
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
TOKENS = random_tokens(4, SMALL)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::clip_min.errors.Note"),  # of files that lie alone
]


# ------------------------------------------- the formats: a file, and its library's own results


def results_of_openai(model):
    return model.encode_image(IMAGES), model.encode_text(TOKENS), model(IMAGES, TOKENS)[0]


def ours_file(theirs, folder):
    save(same_in_ours(theirs, SMALL), folder / "ours.safetensors")
    return folder / "ours.safetensors", results_of_openai(theirs)


def in_hugging_face(theirs) -> transformers.CLIPModel:
    """The same weights, module by module, in Hugging Face's classes."""
    shared = {"hidden_act": "quick_gelu", "projection_dim": SMALL.embed_dim}
    config = transformers.CLIPConfig(
        projection_dim=SMALL.embed_dim,
        vision_config={
            **shared,
            "hidden_size": SMALL.vision_width,
            "intermediate_size": 4 * SMALL.vision_width,
            "num_hidden_layers": SMALL.vision_layers,
            "num_attention_heads": SMALL.vision_heads,
            "image_size": SMALL.image_size,
            "patch_size": SMALL.patch_size,
        },
        text_config={
            **shared,
            "hidden_size": SMALL.text_width,
            "intermediate_size": 4 * SMALL.text_width,
            "num_hidden_layers": SMALL.text_layers,
            "num_attention_heads": SMALL.text_heads,
            "vocab_size": SMALL.vocab_size,
            "bos_token_id": SMALL.vocab_size - 2,
            "eos_token_id": SMALL.vocab_size - 1,  # where it reads a text's features
        },
    )
    model = transformers.CLIPModel(config).eval()
    vision, text = model.vision_model, model.text_model
    blocks = zip(
        [*vision.encoder.layers, *text.encoder.layers],
        [*theirs.visual.transformer.resblocks, *theirs.transformer.resblocks],
        strict=True,
    )
    modules = [
        (vision.embeddings.patch_embedding, theirs.visual.conv1),
        (vision.pre_layrnorm, theirs.visual.ln_pre),
        (vision.post_layernorm, theirs.visual.ln_post),
        (text.embeddings.token_embedding, theirs.token_embedding),
        (text.final_layer_norm, theirs.ln_final),
    ]
    tensors = [
        (model.logit_scale, theirs.logit_scale),
        (model.visual_projection.weight, theirs.visual.proj.T),
        (model.text_projection.weight, theirs.text_projection.T),
        (vision.embeddings.class_embedding, theirs.visual.class_embedding),
        (vision.embeddings.position_embedding.weight, theirs.visual.positional_embedding),
        (text.embeddings.position_embedding.weight, theirs.positional_embedding),
    ]
    for layer, block in blocks:
        attention = layer.self_attn
        modules += [
            (layer.layer_norm1, block.ln_1),
            (layer.layer_norm2, block.ln_2),
            (layer.mlp.fc1, block.mlp.c_fc),
            (layer.mlp.fc2, block.mlp.c_proj),
            (attention.out_proj, block.attn.out_proj),
        ]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        fused = zip(
            block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
        )
        for projection, (weight, bias) in zip(projections, fused, strict=True):
            tensors += [(projection.weight, weight), (projection.bias, bias)]
    for target, source in modules:
        target.load_state_dict(source.state_dict())
    with torch.no_grad():
        for target, source in tensors:
            target.copy_(source)
    return model


def results_of_hugging_face(model):
    image = model.get_image_features(pixel_values=IMAGES)
    text = model.get_text_features(input_ids=TOKENS)
    # Since transformers 5 these are outputs with more in them.
    image, text = (getattr(features, "pooler_output", features) for features in (image, text))
    return image, text, model(pixel_values=IMAGES, input_ids=TOKENS).logits_per_image


def hugging_face_file(theirs, folder):
    in_hugging_face(theirs).save_pretrained(folder)
    read_back = transformers.CLIPModel.from_pretrained(folder)
    return folder / "model.safetensors", results_of_hugging_face(read_back)


def hugging_face_bin(theirs, folder):
    model = in_hugging_face(theirs)
    positions = torch.arange(77)[None]  # a buffer that files of transformers before 4.31 hold
    torch.save(
        {**model.state_dict(), "text_model.embeddings.position_ids": positions},
        folder / "pytorch_model.bin",
    )
    return folder / "pytorch_model.bin", results_of_hugging_face(model)


def open_clip_file(theirs, folder, kind=OpenClip, prefix=""):
    model = kind(
        embed_dim=SMALL.embed_dim,
        vision_cfg={
            "image_size": SMALL.image_size,
            "patch_size": SMALL.patch_size,
            "width": SMALL.vision_width,
            "layers": SMALL.vision_layers,
        },
        text_cfg={
            "context_length": SMALL.context_length,
            "vocab_size": SMALL.vocab_size,
            "width": SMALL.text_width,
            "heads": SMALL.text_heads,
            "layers": SMALL.text_layers,
        },
        quick_gelu=True,
    ).eval()
    model.load_state_dict(
        {
            name if name.startswith(("visual.", "logit_scale")) else prefix + name: tensor
            for name, tensor in theirs.state_dict().items()
        }
    )
    path = folder / "open_clip_model.safetensors"
    save_file(model.state_dict(), path)
    image, text, scale = model(IMAGES, TOKENS)
    logits = scale * image @ text.T
    return path, (model.encode_image(IMAGES), model.encode_text(TOKENS), logits)


def open_clip_custom_text_file(theirs, folder):
    return open_clip_file(theirs, folder, CustomTextCLIP, "text.")


def torchscript(theirs, path: Path, dtype=torch.float32) -> Path:
    """An archive such as OpenAI's, with the sizes as buffers."""
    model = copy.deepcopy(theirs)
    if dtype == torch.float16:
        clip.model.convert_weights(model)
    for name, size in {"input_resolution": 32, "context_length": 77, "vocab_size": 1000}.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(size))
    images = IMAGES.to(dtype)
    inputs = {"forward": (images, TOKENS), "encode_image": images, "encode_text": TOKENS}
    torch.jit.trace_module(model, inputs, check_trace=False).save(path)
    return path


def torchscript_file(theirs, folder):
    path = torchscript(theirs, folder / "archive.pt")
    return path, results_of_openai(torch.jit.load(path))


def state_dict_file(theirs, folder):
    torch.save(theirs.state_dict(), folder / "state.pt")
    return folder / "state.pt", results_of_openai(theirs)


def checkpoint_file(theirs, folder):
    parallel = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": parallel}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth", results_of_openai(theirs)


FORMATS = {
    "ours": ours_file,
    "Hugging Face": hugging_face_file,
    "Hugging Face .bin": hugging_face_bin,
    "open_clip": open_clip_file,
    "open_clip with custom text": open_clip_custom_text_file,
    "OpenAI TorchScript": torchscript_file,
    "OpenAI state dict": state_dict_file,
    "training checkpoint": checkpoint_file,
}


@pytest.fixture(scope="module", params=FORMATS)
def given(request, theirs, tmp_path_factory):
    """A file, and what its own library computes from it: features of images, of texts, logits."""
    with torch.no_grad():
        return FORMATS[request.param](theirs, tmp_path_factory.mktemp("weights"))


def test_every_tensor_is_equal(given, state):
    assert_holds(load(given[0]), state)


@torch.no_grad()
def test_features_and_logits_equal_those_of_its_library(given):
    path, (image, text, logits) = given
    model = load(path)
    assert not model.training
    assert far(model.encode_image(IMAGES), image) < CLOSE
    assert far(model.encode_text(TOKENS), text) < CLOSE
    assert far(model(IMAGES, TOKENS), logits) < CLOSE


def test_convert_writes_equal_tensors_under_our_names(given, state, tmp_path, capsys):
    target = tmp_path / "converted.safetensors"
    assert weights.main(["convert", str(given[0]), str(target)]) == 0
    said = capsys.readouterr()
    assert str(target) in said.out
    assert said.err == ""
    assert_holds(load(target), state)
    written = load_file(target)
    assert written.keys() == state.keys()


def test_all_parameters_can_be_trained(given):
    model = load(given[0])
    model(IMAGES, TOKENS).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@torch.no_grad()
def test_a_float16_file_loads_as_either_dtype(theirs, tmp_path):
    """OpenAI's own loader is the oracle: it, too, computes in float32 on a CPU."""
    path = torchscript(theirs, tmp_path / "archive.pt", torch.float16)
    oracle = clip.load(str(path), device="cpu")[0]
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_holds(model, renamed(oracle.state_dict()))
    assert far(model(IMAGES, TOKENS), oracle(IMAGES, TOKENS)[0]) < CLOSE
    half = load(path, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half(IMAGES, TOKENS).dtype == torch.float16
    assert far(half(IMAGES, TOKENS), oracle(IMAGES, TOKENS)[0]) < 0.01


def test_saving_in_float16_keeps_the_rounded_values(theirs, state, tmp_path):
    path = tmp_path / "half.safetensors"
    save(same_in_ours(theirs, SMALL), path, torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    rounded = {name: tensor.half() for name, tensor in state.items()}
    assert_holds(load(path, dtype=torch.float16), rounded)
    assert_holds(load(path), {name: tensor.float() for name, tensor in rounded.items()})


def test_saving_keeps_a_number_of_heads_that_no_tensor_tells(tmp_path):
    config = CONFIGS["demo"]  # its heads are 32 wide, not 64
    model = CLIP(config)
    save(model, tmp_path / "demo.safetensors")
    loaded = load(tmp_path / "demo.safetensors")
    assert loaded.config == config
    assert_holds(loaded, model.state_dict())


def test_the_demo_model_ships_whole_and_small():
    assert load("demo").config == CONFIGS["demo"]
    assert hub.DEMO.stat().st_size < 8_000_000


def test_sizes_read_off_the_tensors_name_the_known_models():
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"):
        with torch.device("meta"):
            state = CLIP(CONFIGS[name]).state_dict()
        assert description.infer_config(state) == CONFIGS[name]
        assert weights.model_name(CONFIGS[name]) == name
    assert weights.model_name(SMALL) == "custom"


def test_a_fingerprint_tells_weights_apart_and_nothing_else(theirs, tmp_path):
    model = same_in_ours(theirs, SMALL)
    save(model, tmp_path / "ours.safetensors")
    before = weights.fingerprint(model)
    assert weights.fingerprint(load(tmp_path / "ours.safetensors")) == before
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.visual.transformer.resblocks[1].mlp.c_fc.weight[3, 4] += 1e-6
    assert weights.fingerprint(other) != before


def test_a_fingerprint_is_computed_once_and_again_after_any_change(theirs, monkeypatch):
    model, hashed = same_in_ours(copy.deepcopy(theirs), SMALL), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda: hashed.append(1) or sha256())
    seen = [weights.fingerprint(model) for _ in range(2)]
    weights.fingerprint(copy.deepcopy(model, {id(t): t for t in model.parameters()}))
    assert (seen[0], len(hashed)) == (seen[1], 1)  # a tree of its own over the same tensors, too
    block = model.visual.transformer.resblocks[1]
    with torch.no_grad():
        block.ln_1.bias[3] += 1e-6  # in place
        seen.append(weights.fingerprint(model))
        block.ln_1.bias = torch.nn.Parameter(block.ln_1.bias + 1e-6)  # replaced
        seen.append(weights.fingerprint(model))
        block.ln_1.bias.data = block.ln_1.bias + 1e-6
        seen.append(weights.fingerprint(model))
    block.attn.heads, model.config = 4, dataclasses.replace(SMALL, vision_heads=4)
    seen.append(weights.fingerprint(model))
    assert len({*seen}) == len(hashed) == 5
    fresh = copy.deepcopy(model)
    assert weights.fingerprint(fresh) == seen[-1]
    with torch.inference_mode():  # whose tensors count no changes, so that nothing can be kept
        fresh.load_state_dict({n: t.clone() for n, t in fresh.state_dict().items()}, assign=True)
        first = weights.fingerprint(fresh)
        fresh.ln_final.bias += 1
        assert seen[-1] == first != weights.fingerprint(fresh)


@pytest.mark.slow
@torch.no_grad()
def test_open_clips_vit_b_16_of_full_size(tmp_path):
    theirs = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = load(tmp_path / "open_clip_model.safetensors")
    assert weights.model_name(model.config) == "ViT-B/16"
    images = torch.randn(2, 3, 224, 224)
    tokens = clip.tokenize(["a rose", "a photo of a lily-valley, a type of flower."]).long()
    assert far(model.encode_image(images), theirs.encode_image(images)) < CLOSE
    assert far(model.encode_text(tokens), theirs.encode_text(tokens)) < CLOSE


MEASURE = """
import sys, torch
from pathlib import Path
from clip_min import load

def told(key):  # kB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

load("demo")  # what is allocated once
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = told("VmRSS:")
clip = load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in clip.parameters())
print((told("VmHWM:") - before) * 1024 / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("names", [to_hugging_face, to_openai_names])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_loading_takes_hardly_more_memory_than_the_model(root, stored, names, suffix, tmp_path):
    """ViT-B/16, in processes of their own; a .bin file is read whole, so it is not cast down."""
    with torch.no_grad():
        state = names(CLIP(CONFIGS["ViT-B/16"]).to(stored).state_dict())
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, file := tmp_path / f"a{suffix}")
    wanted = ["float32"] if suffix == ".bin" else ["float32", "float16"]
    for dtype in wanted:
        command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(file), dtype]
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert 0.9 < float(run.stdout) <= 1.3  # a second copy of the weights would be 2


@torch.no_grad()
@pytest.mark.parametrize("image_size", [16, 24, 40, 64, 336])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_positions_are_resized_as_open_clip_resizes_them(
    image_size, dtype, close, theirs, tmp_path
):
    """The patches are 8 pixels; the model was made for 32."""
    save(same_in_ours(theirs, SMALL), tmp_path / "a.safetensors")
    like = SimpleNamespace(visual=SimpleNamespace(grid_size=(image_size // 8,) * 2))
    state = {"visual.positional_embedding": theirs.visual.positional_embedding.detach()}
    open_clip.model.resize_pos_embed(state, like)
    clip = load(tmp_path / "a.safetensors", dtype=dtype, image_size=image_size)
    assert far(clip.visual.positional_embedding, state["visual.positional_embedding"]) < close
    assert clip.config == dataclasses.replace(SMALL, image_size=image_size)
    images = torch.randn(2, 3, image_size, image_size, dtype=dtype)
    assert clip.encode_image(images).shape == (2, SMALL.embed_dim)


def test_a_resized_model_is_the_same_on_every_processor():
    """Else a run could not be tested elsewhere."""
    code = "from clip_min import weights as w; print(w.fingerprint(w.load('demo', image_size=96)))"
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], check=True)
    found = [
        run(env=os.environ | {"ATEN_CPU_CAPABILITY": kernels}, capture_output=True).stdout
        for kernels in ("default", "avx2")
    ]
    assert found[0] == found[1] != b""


def test_a_resized_model_is_another_and_is_saved_as_it_is(theirs, tmp_path):
    save(same_in_ours(theirs, SMALL), tmp_path / "a.safetensors")
    plain, same, larger = (load(tmp_path / "a.safetensors", image_size=n) for n in (0, 32, 48))
    assert weights.fingerprint(plain) == weights.fingerprint(same) != weights.fingerprint(larger)
    save(larger, tmp_path / "b.safetensors")
    assert load(tmp_path / "b.safetensors").config == larger.config
    assert_holds(load(tmp_path / "b.safetensors"), larger.state_dict())
    for size in (-8, 30, 33):
        with pytest.raises(UserError, match=f"images of {size} pixels; .* multiple of .* 8"):
            load(tmp_path / "a.safetensors", image_size=size)


# ------------------------------------------------------------------------------------- bad files


def refusal(path: str | Path) -> str:
    """The one line with which a file is refused, all that is said about it; it names the file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(UserError) as error:
            load(path)
    assert [warning for warning in said if warning.category is not Note] == []
    message = str(error.value)
    assert message.isprintable(), message  # so it is one line, and no escape code colours it
    assert message.startswith(str(path))
    return message


def test_missing_unexpected_and_misshapen_tensors_are_all_named(state, tmp_path):
    del state["ln_final.bias"], state["visual.transformer.resblocks.1.ln_2.weight"]
    state["extra.weight"] = torch.zeros(3)
    state["visual.proj"] = torch.zeros(3, 32)
    state["logit_scale"] = torch.zeros(1)
    state["visual.class_embedding"] = torch.zeros(128, dtype=torch.int8)
    save_file(state, tmp_path / "bad.safetensors")
    message = refusal(tmp_path / "bad.safetensors")
    assert "ln_final.bias is missing" in message
    assert "visual.transformer.resblocks.1.ln_2.weight is missing" in message
    assert "extra.weight is unexpected" in message
    assert "visual.proj has shape (3, 32), expected (128, 32)" in message
    assert "logit_scale has shape (1,), expected ()" in message
    assert "visual.class_embedding is torch.int8" in message
    assert message.count(";") == 5  # and nothing else is


def test_of_many_problems_twenty_are_shown_and_all_are_counted(state, tmp_path):
    del state["visual.conv1.weight"]
    state["visual.conv1.weight"] = torch.zeros(64, 3, 8, 8)  # half as wide as the rest
    save_file(state, tmp_path / "bad.safetensors")
    message = refusal(tmp_path / "bad.safetensors")
    wide = [t for name, t in state.items() if name.startswith("visual.") and t.dim() > 0]
    assert f"; and {len(wide) - 1 - 20} more" in message


SIZING = {  # the tensors that tell the sizes, with a shape from which none can be read
    "visual.conv1.weight": (128, 3),
    "visual.positional_embedding": (),
    "text_projection": (64,),
    "positional_embedding": (),
    "token_embedding.weight": (),
}


@pytest.mark.parametrize("name", SIZING)
def test_a_tensor_that_tells_no_size_is_named(state, tmp_path, name):
    state[name] = torch.zeros(SIZING[name])
    save_file(state, tmp_path / "bad.safetensors")
    assert f"{name} has shape {SIZING[name]}" in refusal(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", SIZING)
def test_without_a_tensor_that_tells_a_size_the_file_is_no_clip(state, tmp_path, name):
    del state[name]
    save_file(state, tmp_path / "bad.safetensors")
    message = refusal(tmp_path / "bad.safetensors")
    assert "not a CLIP (ViT)" in message
    assert f"'{name}'" in message


@pytest.mark.parametrize("tower", ["transformer.", "visual.transformer."])
def test_a_tower_without_blocks_is_no_clip(state, tmp_path, tower):
    state = {n: t for n, t in state.items() if not n.startswith(f"{tower}resblocks.")}
    save_file(state, tmp_path / "bad.safetensors")
    assert f"no tensor '{tower}resblocks.0'" in refusal(tmp_path / "bad.safetensors")


def test_a_tower_without_one_of_its_blocks_is_told_what_it_lacks(state, tmp_path):
    lost = "visual.transformer.resblocks.1."
    state = {n: t for n, t in state.items() if not n.startswith(lost)}
    save_file(state, tmp_path / "bad.safetensors")
    assert f"{lost}attn.in_proj.weight is missing" in refusal(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("part", "qkv")
def test_hugging_face_files_without_a_projection_are_told_which(theirs, tmp_path, part):
    state = in_hugging_face(theirs).state_dict()
    del state[f"text_model.encoder.layers.1.self_attn.{part}_proj.weight"]
    save_file(state, tmp_path / "bad.safetensors")
    message = refusal(tmp_path / "bad.safetensors")
    assert f"layers.1.self_attn.{part}_proj.weight" in message or (
        part == "q" and "transformer.resblocks.1.attn.in_proj.weight is missing" in message
    )


def test_hugging_face_projections_that_do_not_fit_together_are_named(theirs, tmp_path):
    state = in_hugging_face(theirs).state_dict()
    name = "text_model.encoder.layers.1.self_attn.v_proj.bias"
    state[name] = torch.zeros(7)
    save_file(state, tmp_path / "bad.safetensors")
    message = refusal(tmp_path / "bad.safetensors")
    assert name.replace("v_proj", "q_proj") in message
    assert "(64,), (64,), (7,)" in message


@pytest.mark.parametrize(
    "header",
    ["nonsense", "{}", "[]", '{"vision_heads": 7, "text_heads": 1}']
    + ['{"vision_heads": 0, "text_heads": 1}', '{"vision_heads": 2, "text_heads": "1"}'],
)
def test_a_header_that_tells_no_heads_is_named(state, tmp_path, header):
    save_file(state, tmp_path / "bad.safetensors", {"clip_min": header})
    assert "bad.safetensors: its header: " in refusal(tmp_path / "bad.safetensors")


def test_a_fingerprint_covers_heads_that_the_weights_do_not_tell():
    """And is of the weights alone where they do, as it always was: runs of before stay valid."""
    narrow, wide = CLIP(CONFIGS["demo"]), CLIP(dataclasses.replace(CONFIGS["demo"], vision_heads=2))
    wide.load_state_dict(narrow.state_dict())
    assert weights.fingerprint(narrow) != weights.fingerprint(wide)
    plain = CLIP(SMALL)
    digest = hashlib.sha256()
    for name, tensor in sorted(plain.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert weights.fingerprint(plain) == digest.hexdigest()[:16]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(state, tmp_path, value):
    state["ln_final.bias"][3] = value
    save_file(state, tmp_path / "bad.safetensors")
    assert "ln_final.bias has NaN or infinity" in refusal(tmp_path / "bad.safetensors")


def test_names_of_20_000_blocks_are_refused_before_they_are_made(state, tmp_path):
    state |= {f"transformer.resblocks.{i}.ln_1.bias": torch.zeros(1) for i in range(20_000)}
    save_file(state, tmp_path / "bad.safetensors")
    assert "20000 blocks transformer.resblocks." in refusal(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", SIZING)
def test_a_tensor_of_no_size_is_named(state, tmp_path, name):
    state[name] = torch.zeros(0, *state[name].shape[1:])
    save_file(state, tmp_path / "bad.safetensors")
    assert f"{name} has shape (0, " in refusal(tmp_path / "bad.safetensors")


def test_a_width_that_its_heads_do_not_divide_is_named(tmp_path):
    with torch.device("meta"):
        config = dataclasses.replace(SMALL, text_width=200, text_heads=5)
        shapes = {name: t.shape for name, t in CLIP(config).state_dict().items()}
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors"
    )
    assert "do not divide the towers' widths, 128 and 200" in refusal(tmp_path / "a.safetensors")


def test_a_clip_with_a_resnet_is_refused(tmp_path):
    resnet = clip.model.CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 100, 64, 1, 1)
    torch.save(resnet.state_dict(), tmp_path / "RN50.pt")
    assert "not a CLIP (ViT)" in refusal(tmp_path / "RN50.pt")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 5_000, 100_000, -1, -1000])
def test_a_safetensors_file_cut_short_is_refused(theirs, tmp_path, size):
    save(same_in_ours(theirs, SMALL), tmp_path / "whole.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:size])
    assert "not a complete safetensors file" in refusal(path)


@pytest.mark.parametrize("form", [torchscript_file, state_dict_file])
def test_a_pt_file_cut_short_is_refused(theirs, tmp_path, form):
    whole = form(theirs, tmp_path)[0].read_bytes()
    for size in (0, 10, 10_000, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        assert "not a state dict of plain tensors" in refusal(tmp_path / "cut.pt")


OTHER = {
    "noise": random.Random(0).randbytes(4096),
    "a web page": b"<html>404 Not Found</html>",
    "the head of a zip file": b"PK\3\4",
}


@pytest.mark.parametrize("name", ["noise.pt", "noise.pth", "noise.bin", "noise.safetensors"])
@pytest.mark.parametrize("content", OTHER)
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(OTHER[content])
    message = refusal(tmp_path / name)
    assert "not a state dict" in message or "not a complete safetensors" in message
    assert "weights_only" not in message  # torch's own advice would be to read it unsafely


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (torch.zeros(3), "holds Tensor"),
        ([torch.zeros(3)], "holds list"),
        ({"state_dict": None}, "holds NoneType"),
        ({"epoch": 3}, "holds int under 'epoch'"),
        ({7: torch.zeros(3)}, "under 7"),
        ({"state_dict": {7: torch.zeros(3)}}, "under 7"),
        ({}, "not a CLIP"),
        ({"lora_A": torch.zeros(3)}, "not a CLIP"),
    ],
    ids=str,
)
def test_a_pt_file_of_other_content_is_told_what_it_holds(tmp_path, content, complaint):
    torch.save(content, tmp_path / "other.pt")
    assert complaint in refusal(tmp_path / "other.pt")


class Malicious:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def as_torchscript(content) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def by_torch(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


DISGUISES = {
    "a bare pickle": pickle.dumps,
    "torch.save": by_torch,
    "torch.save, old format": lambda x: by_torch(x, _use_new_zipfile_serialization=False),
    "inside a state dict": lambda x: by_torch({"state_dict": {"visual.conv1.weight": x}}),
    "inside a TorchScript archive": as_torchscript,
}


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, disguise, name):
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(DISGUISES[disguise](Malicious(marker)))
    message = refusal(tmp_path / name)
    assert not marker.exists()
    assert "weights_only" not in message
    if disguise == "a bare pickle":  # to see that the trap is real
        pickle.loads((tmp_path / name).read_bytes()).close()
        assert marker.exists()


@pytest.mark.parametrize("part", ["data/0", "data.pkl"])
def test_a_packed_archive_is_refused_before_it_fills_the_memory(tmp_path, part):
    """100 kB that would be 100 MB, and could as well be a terabyte; PyTorch itself reads them."""
    torch.save({"a": torch.zeros(25_000_000)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as source,
        zipfile.ZipFile(tmp_path / "a.pt", "w") as archive,
    ):
        for name in source.namelist():
            way = zipfile.ZIP_DEFLATED if name.endswith(f"/{part}") else zipfile.ZIP_STORED
            archive.writestr(name, source.read(name), way)
    assert f"{part} is compressed" in refusal(tmp_path / "a.pt")


class Hostile(torch.nn.Module):
    """TorchScript that, once torch.jit.load reads it, overwrites a file, or never ends."""

    def __init__(self, path: str, loops: bool):
        super().__init__()
        self.path, self.loops = path, loops
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.loops, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool, bool]):
        self.path, self.loops, self.training = state[0], state[1], state[2]
        self.weight = torch.zeros(0)
        while self.loops:
            self.weight = torch.zeros(0)
        self.weight = torch.from_file(self.path, True, 6, dtype=torch.uint8).fill_(33)

    def forward(self, x):
        return x


@pytest.mark.parametrize("loops", [False, True])
def test_a_torchscript_archive_with_code_of_its_own_is_refused_and_runs_none(tmp_path, loops):
    victim, archive = tmp_path / "victim.txt", tmp_path / "hostile.pt"
    victim.write_bytes(b"mine..")
    hostile = torch.jit.script(Hostile(str(victim), loops))
    hostile.save(archive)
    assert "not a CLIP" in refusal(archive)
    assert victim.read_bytes() == b"mine.."
    if not loops:  # to see that the trap is real
        torch.jit.load(archive)
        assert victim.read_bytes() == b"!!!!!!"


class Odd(torch.nn.Module):
    """Parts of every kind: views of one storage, transposed, of several types, shared, nested."""

    def __init__(self):
        super().__init__()
        whole = torch.arange(24.0).reshape(4, 6)
        self.a, self.b = torch.nn.Parameter(whole[1:3, 2:]), torch.nn.Parameter(whole.T)
        self.tower = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
        self.register_buffer("halves", torch.arange(3).half())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("size", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        return self.tower(x) + self.a.sum() + self.b.sum() + self.halves.sum() + self.size


@pytest.mark.parametrize("compiled", ["scripted", "traced"])
def test_an_archives_tensors_are_those_that_torchscript_reads(tmp_path, compiled):
    model, x = Odd().eval(), torch.ones(2, 6)
    module = torch.jit.script(model) if compiled == "scripted" else torch.jit.trace(model, x)
    module.save(tmp_path / "odd.pt")
    found, expected = read_pickled(tmp_path / "odd.pt"), torch.jit.load(tmp_path / "odd.pt")
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def pickled_tensor(shape, strides, start=0, kind="FloatStorage", length=6) -> bytes:
    """The data.pkl of a module with one tensor of a storage of six numbers."""
    text = f"c__torch__.M\nM\n)\x81}}Vw\nctorch._utils\n_rebuild_tensor_v2\n(({'Vstorage'}\n"
    text += f"ctorch\n{kind}\nV0\nVcpu\nI{length}\ntQI{start}\n"
    for numbers in (shape, strides):
        text += "(" + "".join(f"I{n}\n" for n in numbers) + "t"
    return (text + "I00\nNtRsb.").encode("latin-1")


@pytest.mark.parametrize(
    "data",
    [
        pickled_tensor((2, 4), (4, 1)),
        pickled_tensor((6,), (1,), start=1),
        pickled_tensor((6,), (1,), start=-1),
        pickled_tensor((3,), (-1,)),
        pickled_tensor((10**9, 10**9), (0, 0)),
        pickled_tensor((6,), (1,), kind="StringStorage"),
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # would be given that much memory
        b"r\xff\xff\xff\xffN.",
        b"(" * 10_000,
        b"",
    ],
)
def test_an_archive_that_lies_about_its_tensors_is_refused(tmp_path, data):
    for content, fits in ((pickled_tensor((2, 3), (3, 1)), True), (data, False)):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name, part in (("data.pkl", content), ("constants.pkl", b")."), ("version", b"3")):
                archive.writestr(f"a/{name}", part)
            archive.writestr("a/data/0", torch.arange(6.0).numpy().tobytes())
        if fits:  # as it is made here, it can be read
            assert torch.equal(
                read_pickled(tmp_path / "a.pt")["w"], torch.arange(6.0).reshape(2, 3)
            )
        else:
            assert "nothing in it was run" in refusal(tmp_path / "a.pt")


def test_openais_file_names_stand_for_openais_sha256(theirs, tmp_path, monkeypatch):
    published = {url.split("/")[-1]: url.split("/")[-2] for url in clip.clip._MODELS.values()}
    assert hub.OPENAI_SHA256.items() <= published.items()
    assert len(hub.OPENAI_SHA256) == 4
    path = tmp_path / "ViT-B-16.pt"
    torch.save(theirs.state_dict(), path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    message = refusal(path)
    assert found[:16] in message
    assert published[path.name][:16] in message
    monkeypatch.setitem(hub.OPENAI_SHA256, path.name, found)
    assert load(path).config == SMALL


@pytest.mark.parametrize("name", ["ViT-B/99", "", "nowhere/model.safetensors", "RN50", "."])
def test_an_unknown_name_is_told_the_known_ones(name):
    message = refusal(name)
    assert all(known in message for known in ("demo", *hub.HUB))
    assert set(hub.HUB) < set(CONFIGS)


def test_an_unknown_ending_is_told_the_known_ones(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    message = refusal(tmp_path / "model.onnx")
    assert all(ending in message for ending in (".safetensors", ".pt", ".pth", ".bin", "'.onnx'"))


# ----------------------------------------------------------------------------------- the command


def test_the_command_converts_in_silence(root, theirs, state, tmp_path):
    """OpenAI's format, whose reader has something to say in recent versions of torch."""
    source, target = torchscript(theirs, tmp_path / "archive.pt"), tmp_path / "ours.safetensors"
    result = convert(root, source, target)
    assert (result.returncode, result.stderr) == (0, "")
    assert str(target) in result.stdout
    assert f"{sum(t.numel() for t in state.values()):,} parameters" in result.stdout
    assert_holds(load(target), state)


def test_the_command_says_one_line_about_a_bad_file(tmp_path, capsys):
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"no weights")
    assert weights.main(["convert", str(bad), str(tmp_path / "ours.safetensors")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {bad}: ")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bad]


def test_the_command_refuses_a_target_of_another_ending(capsys, tmp_path):
    assert weights.main(["convert", "demo", str(tmp_path / "out.pt")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "out.pt" in said.err
    assert ".safetensors" in said.err


def test_the_command_leaves_what_is_there_already(capsys, tmp_path):
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"precious")
    assert weights.main(["convert", "demo", str(target)]) == 2
    assert capsys.readouterr().err == (
        f"error: {target}: exists already; choose another place, or remove it\n"
    )
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["convert"],
        ["convert", "demo"],
        ["convret", "demo", "a.safetensors"],
        ["convert", "demo", "a.safetensors", "--fast"],
        ["convert", "demo", f"{'n' * 300}.safetensors"],
        ["convert", f"{'n' * 300}.pt", "a.safetensors"],
        ["convert", "demo", "/dev/null/a.safetensors"],
    ],
)
def test_whatever_the_command_is_given_it_says_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.main(argv) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["out.safetensors", "folder"])
def test_what_a_killed_export_left_is_removed_by_the_next_to_the_same_place(tmp_path, target):
    left = [tmp_path / f".clip_min-{name}-abcdefgh" for name in (target, "other")]
    mine = tmp_path / ".notes.20240131.md"
    for folder in left:
        folder.mkdir()
        (folder / "half").write_bytes(b"")
    mine.write_text("mine")
    remove_half_written(tmp_path, target)
    assert sorted(tmp_path.iterdir()) == [left[1], mine]


# --------------------------------------------------------------------------------- failed writes


@pytest.fixture
def earlier(theirs, tmp_path) -> Path:
    """A file of weights, alone in its folder, which a failed write must not touch."""
    path = tmp_path / "folder" / "model.safetensors"
    save(same_in_ours(theirs, SMALL), path)
    return path


def break_saving(monkeypatch, error: BaseException) -> None:
    def save_file(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("clip_min.files.save_file", save_file)


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_the_earlier_file_alone(earlier, monkeypatch):
    before = earlier.read_bytes()
    break_saving(monkeypatch, FULL)
    with pytest.raises(UserError, match="No space left") as error:
        save(CLIP(SMALL), earlier)
    assert str(error.value).startswith(str(earlier))
    assert str(error.value).isprintable()
    assert earlier.read_bytes() == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_an_interrupted_write_leaves_the_earlier_file_alone(earlier, monkeypatch):
    before = earlier.read_bytes()
    break_saving(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(CLIP(SMALL), earlier)
    assert earlier.read_bytes() == before
    assert list(earlier.parent.iterdir()) == [earlier]


def test_a_disk_that_fills_while_safetensors_writes(earlier):
    """The real writer, stopped by the system: no file may grow beyond 100 kB."""
    before = earlier.read_bytes()
    assert len(before) > 1_000_000
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match="could not be written") as error:
            save(CLIP(SMALL), earlier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(error.value).isprintable()
    assert earlier.read_bytes() == before
    assert list(earlier.parent.iterdir()) == [earlier]


@pytest.mark.parametrize("target", ["file/model.safetensors", "file/deep/model.safetensors"])
def test_a_target_below_a_file_is_one_line(tmp_path, target):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError) as error:
        save(CLIP(SMALL), tmp_path / target)
    assert str(error.value).startswith(str(tmp_path / target))
    assert str(error.value).isprintable()
    assert (tmp_path / "file").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_target_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError):
        save(CLIP(SMALL), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]
    assert list((tmp_path / "model.safetensors").iterdir()) == []


def test_whoever_reads_the_earlier_file_reads_it_to_its_end(earlier):
    """The new file takes its name in one step; the old one is not written into."""
    before = earlier.read_bytes()
    with open(earlier, "rb") as reader:
        start = reader.read(1000)
        save(CLIP(SMALL), earlier)
        assert start + reader.read() == before
    assert earlier.read_bytes() != before


def test_a_save_replaces_the_earlier_file_and_makes_folders(earlier, tmp_path):
    other = CLIP(SMALL)
    for target in (earlier, tmp_path / "new" / "folder" / "model.safetensors"):
        save(other, target)
        assert_holds(load(target), other.state_dict())
        assert list(target.parent.iterdir()) == [target]
    header = json.loads(weights.read_safetensors(earlier)[1]["clip_min"])
    assert CLIPConfig(**header | {key: tuple(header[key]) for key in ("mean", "std")}) == SMALL
