"""The methods by name, in the order a learner may read them: each file adds one idea."""

from methods.base import Method, Settings, TrainingSettings
from methods.cocoop import CoCoOp
from methods.coop import CoOp
from methods.disef import DISEF, DISEF_F1
from methods.lora import LoRA
from methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "lora": LoRA,
    "disef": DISEF,
    "disef_f1": DISEF_F1,
}

__all__ = ["METHODS", "Method", "Settings", "TrainingSettings"]
