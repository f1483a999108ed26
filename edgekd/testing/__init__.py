"""Suites that a plug-in of your own subclasses and passes, run by pytest; only this package of edgekd needs it (`pip install "edgekd[testing]"`)."""

# ruff: noqa: E402 (pytest must know the modules before they are imported, or their assertions explain nothing)
import pytest

pytest.register_assert_rewrite("edgekd.testing.transports", "edgekd.testing.runtimes", "edgekd.testing.converters")

from edgekd.testing.converters import ConverterContract
from edgekd.testing.models import remembering, remembering_outputs, remembering_sequences, two_headed, two_headed_outputs, two_inputs
from edgekd.testing.runtimes import QUICK_PROTOCOL, RuntimeContract
from edgekd.testing.transports import TransportContract

__all__ = [
    "ConverterContract",
    "QUICK_PROTOCOL",
    "RuntimeContract",
    "TransportContract",
    "remembering",
    "remembering_outputs",
    "remembering_sequences",
    "two_headed",
    "two_headed_outputs",
    "two_inputs",
]
