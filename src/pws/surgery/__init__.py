"""Changes to a model as a whole: conversion, calibration from data, folding."""

from pws.surgery.calibrate import Calibrated, calibrate
from pws.surgery.convert import convert, plan
from pws.surgery.fold import fold
from pws.surgery.plan import Plan, Step

__all__ = ["Calibrated", "Plan", "Step", "calibrate", "convert", "fold", "plan"]
