"""Engines: published vision transformers behind one call, with their input contract stated.

engine = load_engine("dinov3:vitl16", weights="dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth")
features = engine(batch)        # [B, 3, 224, 224] -> [B, 1024] float32

models/ makes a `Backbone` of a spec, one file per kind; assemble.py adds outputs and channels;
runtimes/ computes it, from torch or from an exported folder; gate.py checks its numbers.
"""

from .contract import InputContract, Resize
from .engine import Engine
from .load import RUNTIMES, load_engine
from .models.zoo import KINDS
from .outputs import OUTPUTS
from .preprocess import model_input

__all__ = [
    "KINDS",
    "OUTPUTS",
    "RUNTIMES",
    "Engine",
    "InputContract",
    "Resize",
    "load_engine",
    "model_input",
]
