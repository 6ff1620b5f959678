import pytest

from clip_min.errors import UserError, nearest


def test_nearest_returns_a_known_name_and_suggests_one_for_an_unknown():
    known = {"lora": 1, "zero_shot": 2}
    assert nearest("--method", "lora", known) == "lora"
    with pytest.raises(UserError, match="--method zeroshot: unknown; did you mean zero_shot"):
        nearest("--method", "zeroshot", known)
    with pytest.raises(UserError, match="--method xyz: unknown; known are lora, zero_shot"):
        nearest("--method", "xyz", known)
