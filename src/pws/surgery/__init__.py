"""Changes to a model as a whole: conversion, calibration from data, folding."""

from pws.surgery._calibrate import Calibrated, calibrate
from pws.surgery._convert import convert, plan
from pws.surgery._fold import fold
from pws.surgery._plan import Plan, Step

__all__ = ["Calibrated", "Plan", "Step", "calibrate", "convert", "fold", "plan"]
