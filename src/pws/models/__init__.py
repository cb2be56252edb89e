"""The paper's networks; each takes any method, number of input channels, classes and width."""

from pws.models.allconv import AllConv
from pws.models.registry import MODELS, build_model
from pws.models.resnet import ResNet
from pws.models.spec import model_of
from pws.models.stack import Stack

__all__ = ["MODELS", "AllConv", "ResNet", "Stack", "build_model", "model_of"]
