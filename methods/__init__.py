"""The methods by name, in the order a learner may read them: each file adds one idea."""

from methods.base import BaseSettings, Method, TrainingSettings
from methods.clip_adapter import ClipAdapter
from methods.cocoop import CoCoOp
from methods.coop import CoOp
from methods.cross_modal import CrossModal
from methods.disef import DISEF, DISEF_F1
from methods.em_dirichlet import EMDirichlet
from methods.finetune import Finetune
from methods.gda import GDA
from methods.kgcoop import KgCoOp
from methods.linear_probe import LinearProbe
from methods.lora import LoRA
from methods.lp_plus_plus import LPPlusPlus
from methods.projection import Projection
from methods.prolip import ProLIP
from methods.promptsrc import PromptSRC
from methods.tip_adapter import TipAdapter, TipAdapterF
from methods.transclip import TransCLIP
from methods.two_stage import TwoStage
from methods.vpt import VPT
from methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    "zero_shot": ZeroShot,
    "linear_probe": LinearProbe,
    "clip_adapter": ClipAdapter,
    "projection": Projection,
    "prolip": ProLIP,
    "tip_adapter": TipAdapter,
    "tip_adapter_f": TipAdapterF,
    "gda": GDA,
    "cross_modal": CrossModal,
    "lp_plus_plus": LPPlusPlus,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "kgcoop": KgCoOp,
    "vpt": VPT,
    "promptsrc": PromptSRC,
    "two_stage": TwoStage,
    "lora": LoRA,
    "disef": DISEF,
    "disef_f1": DISEF_F1,
    "finetune": Finetune,
    "em_dirichlet": EMDirichlet,
    "transclip": TransCLIP,
}

__all__ = ["METHODS", "Method", "BaseSettings", "TrainingSettings"]
