"""Write a CLIP in the formats of openai-clip, transformers and open_clip.

    save_openai        one .safetensors file, for `clip.model.build_model`
    save_hugging_face  a folder, for `transformers.CLIPModel.from_pretrained` and `CLIPProcessor`
    save_open_clip     a folder, for `open_clip.create_model("local-dir:…")`; the weights in it are
                       the file that `pretrained=` takes

Class names and template, {"classnames": […], "template": …} (or "prompts"), are saved with the
model: in the header of a single file, in the config of a folder (Hugging Face's config has the
names as id2label and label2id).

A folder is complete: sizes, preprocessing and (Hugging Face) tokenizer are saved beside the
weights, so that the software that loads it downloads nothing and guesses nothing, least of all the
activation.

There is no `.pt` for `clip.load`: torch saves a state dict as a pickle, and this code writes none.
"""

import json
from dataclasses import asdict
from pathlib import Path

from clip_min.description import UNTOLD
from clip_min.errors import UserError
from clip_min.files import new_folder, write_json, write_safetensors, write_text
from clip_min.model import CLIP, CLIPConfig
from clip_min.names import to_hugging_face, to_openai_names
from clip_min.tokenizer import END, START, VOCAB_SIZE, tokenizer


def save_openai(clip: CLIP, path: str | Path, about: dict | None = None) -> None:
    """A file with OpenAI's names. UserError, if the model differs from what OpenAI's code assumes:
    heads 64 wide, QuickGELU, OpenAI's preprocessing.
    """
    config = clip.config
    differ = [key for key in UNTOLD if getattr(config, key) != getattr(CLIPConfig, key)]
    if differ:
        raise UserError(
            f"openai-clip assumes OpenAI's own {' and '.join(differ)}, but this model's is "
            f"{' and '.join(str(getattr(config, key)) for key in differ)}; export it for "
            "transformers or open_clip, which can load it"
        )
    for tower in ("vision", "text"):
        width, heads = getattr(config, f"{tower}_width"), getattr(config, f"{tower}_heads")
        if heads != width // 64:
            raise UserError(
                f"openai-clip assumes heads 64 wide, but the {tower} tower of this model has "
                f"{heads} heads {width // heads} wide; export it for transformers or open_clip, "
                "which can load it"
            )
    header = json.dumps(asdict(config) | (about or {}), ensure_ascii=False)
    write_safetensors(path, to_openai_names(clip.state_dict()), {"clip_min": header})


def save_hugging_face(clip: CLIP, folder: str | Path, about: dict | None = None) -> None:
    """Weights, sizes, preprocessing and tokenizer, in a new folder."""
    with new_folder(folder) as folder:
        # Without this header, transformers assumes that another framework wrote the file.
        state = to_hugging_face(clip.state_dict())
        write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
        config = hugging_face_config(clip.config)
        if about:
            names = about["classnames"]
            config |= about | {"id2label": dict(enumerate(names))}
            config |= {"label2id": {name: label for label, name in enumerate(names)}}
            del config["classnames"]
        write_json(folder / "config.json", config)
        write_json(folder / "preprocessor_config.json", _image_processor(clip.config))
        bpe = tokenizer()
        write_json(folder / "vocab.json", bpe.ids)
        merges = "".join(f"{first} {second}\n" for first, second in bpe.rank)
        write_text(folder / "merges.txt", f"#version: 0.2\n{merges}")
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        length = {"model_max_length": clip.config.context_length}
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", **special, **length},
        )


def save_open_clip(clip: CLIP, folder: str | Path, about: dict | None = None) -> None:
    """Weights, sizes and preprocessing, in a new folder; the tokenizer is open_clip's own."""
    with new_folder(folder) as folder:
        state = to_openai_names(clip.state_dict())
        write_safetensors(folder / "open_clip_model.safetensors", state)
        write_json(
            folder / "open_clip_config.json",
            {
                "model_cfg": open_clip_config(clip.config),
                "preprocess_cfg": {
                    "mean": clip.config.mean,
                    "std": clip.config.std,
                    "interpolation": clip.config.interpolation,
                    "resize_mode": clip.config.resize,
                },
                **(about or {}),
            },
        )


def hugging_face_config(config: CLIPConfig) -> dict:
    """What `transformers.CLIPConfig(**…)` takes."""
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "torch_dtype": "float32",
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "max_position_embeddings": config.context_length,
            "vocab_size": config.vocab_size,
            # The text feature is read at the end token; the model may know more than the tokenizer.
            "bos_token_id": min(config.vocab_size, VOCAB_SIZE) - 2,
            "eos_token_id": min(config.vocab_size, VOCAB_SIZE) - 1,
        },
    }


def open_clip_config(config: CLIPConfig) -> dict:
    """What `open_clip.model.CLIP(**…)` takes."""
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.vision_width // config.vision_heads,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


def _image_processor(config: CLIPConfig) -> dict:
    """preprocess.py as Hugging Face's settings; Pillow's number 3 is bicubic, 2 bilinear."""
    square = {"height": config.image_size, "width": config.image_size}
    squash = config.resize == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": config.image_size},
        "resample": 2 if config.interpolation == "bilinear" else 3,
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }
