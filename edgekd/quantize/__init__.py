"""From a float artifact to the int8 one that loses least: calibration, recipes, sensitivity, and the run that joins them."""

from edgekd.quantize.calibrate import Stability, Statistics, observe
from edgekd.quantize.proposals import PROPOSALS, Proposal, propose
from edgekd.quantize.recipes import SCHEMES, candidate_schemes, make_recipe
from edgekd.quantize.run import QuantizeResult, Tried, quantize

__all__ = [
    "PROPOSALS",
    "SCHEMES",
    "Proposal",
    "QuantizeResult",
    "Stability",
    "Statistics",
    "Tried",
    "candidate_schemes",
    "make_recipe",
    "observe",
    "propose",
    "quantize",
]
