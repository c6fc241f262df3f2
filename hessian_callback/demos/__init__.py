"""Small models and data sets that the example configurations train on."""

from hessian_callback.demos.character_gpt import CharacterGPT
from hessian_callback.demos.classifier import ImageClassifier
from hessian_callback.demos.digits import DigitsCNN, DigitsData
from hessian_callback.demos.images import ImageData
from hessian_callback.demos.networks import FullyConnected, LeNet, ResNet18
from hessian_callback.demos.pretrained_lm import PretrainedLM, TokenData
from hessian_callback.demos.texts import TextData

__all__ = [
    "CharacterGPT",
    "DigitsCNN",
    "DigitsData",
    "FullyConnected",
    "ImageClassifier",
    "ImageData",
    "LeNet",
    "PretrainedLM",
    "ResNet18",
    "TextData",
    "TokenData",
]
