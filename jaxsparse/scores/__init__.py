"""Scores: functions of one leaf and evidence about it; larger means keep."""

from jaxsparse.scores._fisher import fisher
from jaxsparse.scores._gradient import gradient
from jaxsparse.scores._magnitude import magnitude
from jaxsparse.scores._movement import movement
from jaxsparse.scores._random import random
from jaxsparse.scores._saliency import saliency
from jaxsparse.scores._snip import snip

__all__ = ["fisher", "gradient", "magnitude", "movement", "random", "saliency", "snip"]
