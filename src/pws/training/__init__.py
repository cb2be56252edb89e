"""Training on Lightning's engine: recipes, data, runs. Needs the extra `train`."""

from pws.training._evaluate import evaluate
from pws.training.callbacks import ClipGrad
from pws.training.federated import FederatedConfig
from pws.training.monitor import MonitorCallback
from pws.training.own import fit
from pws.training.private.config import PrivacyConfig
from pws.training.recipe import DataConfig, ModelConfig, OptimConfig, Recipe, TrainerConfig
from pws.training.recipe_file import load_recipe, shipped_recipes
from pws.training.results import DetectionEvaluation, Evaluation
from pws.training.run import train
from pws.training.summary import Summary
from pws.training.trained import weights

__all__ = [
    "ClipGrad",
    "DataConfig",
    "DetectionEvaluation",
    "Evaluation",
    "FederatedConfig",
    "ModelConfig",
    "MonitorCallback",
    "OptimConfig",
    "PrivacyConfig",
    "Recipe",
    "Summary",
    "TrainerConfig",
    "evaluate",
    "fit",
    "load_recipe",
    "shipped_recipes",
    "train",
    "weights",
]
