"""Where weights come from: a name, a file or a folder -> a local file.

    locate("demo")                        the small CLIP that ships with this package
    locate("ViT-B/16")                    OpenAI's weights, at a revision and sha256 that are pinned
    locate("apple/DFN2B-CLIP-ViT-B-16")   a repository of the Hugging Face hub, or its @REVISION
    locate("ViT-B-16.pt")                 a file, as it is
    locate("folder")                      the weights in a folder of Hugging Face's or open_clip's

Downloads go into the cache of the hub's client; once all files are there, no network is used. The
files that describe a model are downloaded first, so that another architecture is refused before
gigabytes of weights are fetched. Of the weights, safetensors are preferred.
"""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

from clip_min.description import HUGGING_FACE, OPEN_CLIP, PROCESSORS, descriptions, plain
from clip_min.errors import UserError, first_line
from clip_min.files import sha256_of

# Names of the weights file in a folder or repository of open_clip or Hugging Face.
IN_FOLDERS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# OWNER/NAME or OWNER/NAME@REVISION; "ViT-…" is a mistyped name of an OpenAI model.
REPOSITORY = re.compile(r"(?!ViT-)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?")
DEMO = Path(__file__).parent / "assets" / "demo.safetensors"

# OpenAI's weights as safetensors with open_clip's names, from where open_clip downloads them:
# repository, revision, and the file's sha256, which several unrelated public projects pin.
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


class Known(NamedTuple):
    """A model that is known to have this architecture. An empty field is unknown."""

    name: str  # for --model
    size: str
    activation: str
    licence: str
    flowers: float | None  # zero-shot accuracy in percent as open_clip publishes it, on Flowers102
    imagenet: float | None  # … and on ImageNet


QUICK, GELU, NC = "quick_gelu", "gelu", "CC BY-NC 4.0"
# Figures are from open_clip's docs/openclip_results.csv, for DFN2B-CLIP-ViT-L-14-39B from its card.
KNOWN = [
    Known("ViT-B/32", "ViT-B/32", QUICK, "MIT", 66.70, 63.32),
    Known("ViT-B/16", "ViT-B/16", QUICK, "MIT", 69.07, 68.34),
    Known("ViT-L/14", "ViT-L/14", QUICK, "MIT", 79.23, 75.54),
    Known("ViT-L/14@336px", "ViT-L/14", QUICK, "MIT", 78.52, 76.56),
    Known("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B/32", GELU, "MIT", 70.24, 66.56),
    Known("laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "ViT-B/32", GELU, "MIT", 73.53, 69.17),
    Known("laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K", "ViT-B/32", GELU, "", 78.22, 72.81),
    Known("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "ViT-B/16", GELU, "MIT", 70.84, 70.23),
    Known("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", "ViT-B/16", GELU, "", 77.01, 73.49),
    Known("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "ViT-L/14", GELU, "MIT", 74.79, 75.25),
    Known("laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "ViT-L/14", GELU, "", 82.62, 79.21),
    Known("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "ViT-H/14", GELU, "", 79.82, 77.96),
    Known("apple/DFN2B-CLIP-ViT-B-16", "ViT-B/16", QUICK, "", 82.01, 76.24),
    Known("apple/DFN2B-CLIP-ViT-L-14", "ViT-L/14", QUICK, "", 86.54, 81.41),
    Known("apple/DFN2B-CLIP-ViT-L-14-39B", "ViT-L/14", GELU, "Apple sample code", 87.84, 82.19),
    Known("apple/DFN5B-CLIP-ViT-H-14", "ViT-H/14", QUICK, "", 89.95, 83.44),
    Known("apple/DFN5B-CLIP-ViT-H-14-378", "ViT-H/14", QUICK, "Apple sample code", 89.35, 84.37),
    Known("timm/vit_base_patch32_clip_224.laion400m_e32", "ViT-B/32", QUICK, "", 66.20, 62.93),
    Known("timm/vit_base_patch32_clip_224.metaclip_400m", "ViT-B/32", QUICK, NC, 68.11, 65.58),
    Known("timm/vit_base_patch32_clip_224.metaclip_2pt5b", "ViT-B/32", QUICK, NC, 69.35, 67.66),
    Known("timm/vit_base_patch16_clip_224.metaclip_400m", "ViT-B/16", QUICK, NC, 72.29, 70.80),
    Known("timm/vit_base_patch16_clip_224.metaclip_2pt5b", "ViT-B/16", QUICK, NC, 73.58, 72.12),
    Known("timm/vit_large_patch14_clip_224.metaclip_400m", "ViT-L/14", QUICK, NC, 76.48, 76.20),
    Known("timm/vit_large_patch14_clip_224.metaclip_2pt5b", "ViT-L/14", QUICK, NC, 81.43, 79.17),
    Known("timm/vit_huge_patch14_clip_224.metaclip_2pt5b", "ViT-H/14", QUICK, NC, 84.48, 80.51),
]


def locate(name: str) -> Path:
    """The local file of a model. It is downloaded if the hub has it and the cache does not.

    UserError, if there is no such model.
    """
    if name in HUB:
        return _download(name, *HUB[name])
    if found := local(name):
        return found
    repo, _, revision = name.partition("@")
    return _download(name, repo, revision or "main")


def local(name: str) -> Path | None:
    """The file of a model that is not on the hub; None, if the name may be one of the hub's.

    UserError, if the name can be neither. No network is used.
    """
    if name == "demo":
        return DEMO
    if name in HUB:
        return None
    path = Path(name).expanduser()
    inside = (path / file for file in IN_FOLDERS)
    if found := next((file for file in (path, *inside) if file.is_file()), None):
        return found
    if path.exists() or path.suffix in SUFFIXES or not REPOSITORY.fullmatch(name):
        known = ", ".join(["demo", *HUB])
        raise UserError(
            f"{name}: neither a weights file nor a folder with {' or '.join(IN_FOLDERS)}, nor a "
            f"known model; give {known}, or OWNER/NAME of the hub: "
            "python -m clip_min.weights list shows some"
        )
    return None


def _download(name: str, repo: str, revision: str, sha256: str | None = None) -> Path:
    """The weights file in the hub's cache, downloaded if it is not there."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    own = re.sub("[/@]", "-", name) + ".pt" if sha256 else repo.split("/")[1]
    advice = f"or give a file: --model path/to/{own}"
    if sha256:
        advice += "; to try things without a download, use --model demo"
    beside = () if sha256 else (OPEN_CLIP, HUGGING_FACE, *PROCESSORS)
    weights = (HUB_FILE,) if sha256 else IN_FOLDERS
    try:
        # A path; None: the hub was not asked yet; or an object: the hub has no such file.
        cached = {
            f: try_to_load_from_cache(repo, f, revision=revision) for f in (*beside, *weights)
        }
        path = next((cached[file] for file in weights if isinstance(cached[file], str)), None)
        better = itertools.takewhile(lambda file: cached[file] != path, weights)
        if path is None or any(cached[file] is None for file in (*beside, *better)):
            url = hf_hub_url(repo, (*beside, *weights)[0], revision=revision)
            try:  # a single request: a download would retry for half a minute without a network
                get_hf_file_metadata(url)
            except EntryNotFoundError:
                pass
            except Exception as error:
                if path is not None:  # what is in the cache must do
                    return Path(path)
                if isinstance(error, HfHubHTTPError):
                    raise
                here = "" if sha256 else "there is no such file or folder here, and "
                raise UserError(
                    f"{name}: {here}{repo} is not in the hub's cache and the hub cannot be reached "
                    f"({first_line(error)}); connect to the internet once to download it, {advice}"
                ) from None
            have, path = path, None
            told: dict[str, UserError | None] = {}  # a description -> what speaks against it
            for file in (*beside, *weights):
                mine = [told[name] for name in descriptions(file) if name in told]
                if file in weights and mine and mine[0]:
                    raise mine[0]  # before gigabytes of weights
                try:
                    found = hf_hub_download(repo, file, revision=revision)
                except LocalEntryNotFoundError:  # the hub cannot be reached any more
                    if have is not None:
                        return Path(have)
                    raise
                except EntryNotFoundError:
                    continue
                if file in weights:
                    path = found
                    break
                if file not in PROCESSORS:
                    try:
                        if plain(Path(found)) is not None:
                            told[file] = None
                    except UserError as error:
                        told[file] = error
            if path is None:
                raise UserError(
                    f"{name}: {repo} has no {' or '.join(weights)} (404), which are the files that "
                    f"can be read here; use another repository, {advice}"
                )
    except UserError as error:
        raise (error if str(error).startswith(name) else UserError(f"{name}: {error}")) from None
    except Exception as error:  # refused, cut off, disk full: error types of three libraries
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "log in with `hf auth login`, " if status in (401, 403) else ""
        if isinstance(error, GatedRepoError):
            hint = f"accept its owners' terms on its page; then {hint}"
        elif isinstance(error, RepositoryNotFoundError) and not sha256:
            hint = f"there is no such file, folder or repository, or it is private; {hint}"
        raise UserError(
            f"{name}: {repo} could not be downloaded ({first_line(error)}); {hint}{advice}"
        ) from None
    if sha256 and (found := sha256_of(path)) != sha256:
        raise UserError(
            f"{path}: sha256 is {found[:16]}…, but {repo} has {sha256[:16]}…; delete this file "
            "to download it again"
        )
    return Path(path)
