"""The algorithms that the implicit ones are compared with, behind the same ``clone``/``adapt``."""

from l2l_implicit.baselines.engine import Learn2LearnMAML
from l2l_implicit.baselines.reptile import Reptile
from l2l_implicit.baselines.unrolled import UnrolledMAML

__all__ = ["Learn2LearnMAML", "Reptile", "UnrolledMAML"]
