"""Distillation: a smaller student of a model, and the recovery of a pruned one."""

from tasks.distillation.students import KeepLayers
from tasks.distillation.training import Distillation, Recovery, Training

__all__ = ["Distillation", "KeepLayers", "Recovery", "Training"]
