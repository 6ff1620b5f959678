"""Where weights come from: a name, a file or a folder -> a local file.

locate("demo")          the small CLIP that ships with this package
locate("ViT-B/16")      OpenAI's weights from the Hugging Face hub, cached where it caches
locate("ViT-B-16.pt")   a file, as it is
locate("folder")        the weights in a folder of Hugging Face's or open_clip's
"""

import re
from pathlib import Path

from clip_min.errors import UserError, first_line
from clip_min.files import sha256_of

# How the file of weights is called in a folder of open_clip's or Hugging Face's.
IN_FOLDERS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
DEMO = Path(__file__).parent / "assets" / "demo.safetensors"

# OpenAI's weights in safetensors form (open_clip's names), as open_clip itself fetches them: where,
# at which revision, and the file's sha256, as several unrelated public projects pin them.
HUB_FILE = "open_clip_model.safetensors"
HUB = {
    "ViT-B/32": (
        "timm/vit_base_patch32_clip_224.openai",
        "a6f597a30f7b82c51704746581f9a4e41421e878",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "ViT-B/16": (
        "timm/vit_base_patch16_clip_224.openai",
        "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "ViT-L/14": (
        "timm/vit_large_patch14_clip_224.openai",
        "18d0535469bb561bf468d76c1d73aa35156c922b",
        "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
    ),
    "ViT-L/14@336px": (
        "timm/vit_large_patch14_clip_336.openai",
        "81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
        "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0",
    ),
}

# sha256 of OpenAI's files, as published in their download addresses.
OPENAI_SHA256 = {
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def locate(name: str, download: bool = True) -> Path | None:
    """The local file of a model; UserError, unless there is such a model.

    download: fetch a named one, if it is not in the hub's cache; else only see that it is known
    (-> None), which takes no time.
    """
    if name == "demo":
        return DEMO
    if name in HUB:
        return _download(name) if download else None
    path = Path(name).expanduser()
    inside = (path / file for file in IN_FOLDERS)
    found = next((file for file in (path, *inside) if file.is_file()), None)
    if found is None:
        known = ", ".join(["demo", *HUB])
        raise UserError(
            f"{name}: neither a weights file nor a folder with {' or '.join(IN_FOLDERS)}, nor a "
            f"known model; models are {known}"
        )
    return found


def _download(name: str) -> Path:
    """The file in the hub's cache; fetched first, if it is not there."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.utils import HfHubHTTPError

    repo, revision, sha256 = HUB[name]
    advice = (
        f"or give a file: --model path/to/{re.sub('[/@]', '-', name)}.pt; --model demo, which has "
        "never seen a photo, is there to try things"
    )
    try:
        path = try_to_load_from_cache(repo, HUB_FILE, revision=revision)
        if not isinstance(path, str):
            url = hf_hub_url(repo, HUB_FILE, revision=revision)
            try:  # once: the download itself would knock for half a minute at a closed door
                get_hf_file_metadata(url)
            except HfHubHTTPError:
                raise
            except Exception as error:
                raise UserError(
                    f"{name}: {repo} is not in the hub's cache and the hub cannot be reached "
                    f"({first_line(error)}); connect once to download it, {advice}"
                ) from None
            path = hf_hub_download(repo, HUB_FILE, revision=revision)
    except UserError:
        raise
    except Exception as error:  # refused, cut off, no room: types of three libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = "log in with `hf auth login`, " if status in (401, 403) else ""
        raise UserError(
            f"{name}: {repo}/{HUB_FILE} could not be downloaded ({first_line(error)}); "
            f"{login}{advice}"
        ) from None
    found = sha256_of(path)
    if found != sha256:
        raise UserError(
            f"{path}: sha256 is {found[:16]}…, but {repo} has {sha256[:16]}…; delete this file, "
            "and it is downloaded again"
        )
    return Path(path)
