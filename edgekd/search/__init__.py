"""The search for students that meet a latency limit under a budget of measurements; free of torch and of targets."""

from edgekd.search.candidates import Size, Watch, count_size, describe_candidates, make_candidates
from edgekd.search.certificate import Infeasible
from edgekd.search.engine import MeasureBatch, search
from edgekd.search.halving import HalvingOutcome, RungRow, pick_finalists, rank_by_training
from edgekd.search.model import Candidate, Seen
from edgekd.search.outcome import RoundRow, SearchOutcome
from edgekd.search.predictor import LatencyPredictor, choice_features
from edgekd.search.selection import Attempt, Selection, choose_passing

__all__ = [
    "Attempt",
    "Candidate",
    "HalvingOutcome",
    "Infeasible",
    "LatencyPredictor",
    "MeasureBatch",
    "RoundRow",
    "RungRow",
    "SearchOutcome",
    "Seen",
    "Selection",
    "Size",
    "Watch",
    "choice_features",
    "choose_passing",
    "count_size",
    "describe_candidates",
    "make_candidates",
    "pick_finalists",
    "rank_by_training",
    "search",
]
