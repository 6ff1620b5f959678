"""What all tests share. Oracles (other people's CLIPs) come with `pip install .[test]`."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# First, so that `pytest` tests this checkout, installed or not, and `import clip_min` never finds
# the folder tests/clip_min.
sys.path.insert(0, str(ROOT))
# Tests compare bits, and a GPU's rounding is its own. Scripts would take one that they see.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Tests are made of small tensors: more threads gain nothing, and on a busy machine lose minutes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def flowers12() -> Path:
    """A folder of real photographs, SPLIT/CLASS/*.jpg: 12 species of Flowers102."""
    folder = Path(os.environ.get("CLIP_MIN_FLOWERS12", ROOT / "../shared/data/flowers12"))
    if not folder.is_dir():
        pytest.skip(f"no photographs: {folder} is not a folder; set CLIP_MIN_FLOWERS12 to one")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    """The folder of a LLaVA with few random weights."""
    from tests.tiny_generators import save_llava

    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory) -> Path:
    """The folder of a Stable Diffusion (image to image) with few random weights, 32 pixels."""
    from tests.tiny_generators import save_diffusion

    folder = tmp_path_factory.mktemp("diffusion")
    save_diffusion(folder)
    return folder
