"""Training a draft for any decoder: prompts, on-policy answers, anchors, losses and the loop over them."""

from .config import TrainConfig
from .trainer import train

__all__ = ["TrainConfig", "train"]
