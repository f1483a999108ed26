"""Own fake-quant modules: a network trained in the rounding that int8 will do to it, and the two roads from there to int8 files.

Importing this package imports torch; nothing of edgekd's core does so by itself.
"""

from edgekd.quantize.qat.fake_quant import FakeQuantize, Phase, QuantWeighted
from edgekd.quantize.qat.prepare import QatModule, QatReport, prepare_qat
from edgekd.quantize.qat.ranges import LearnedRanges, learned_ranges

__all__ = ["FakeQuantize", "LearnedRanges", "Phase", "QatModule", "QatReport", "QuantWeighted", "learned_ranges", "prepare_qat"]
