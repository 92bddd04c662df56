"""The errors a caller can meet. Every message names what, expected, found, and what to do."""

from __future__ import annotations

import re


class LindepError(Exception):
    """Base of all errors that this package raises on purpose.

    Attributes:
        exit_code: what the command line returns for it.
    """

    exit_code = 1


class UsageError(LindepError):
    """An option, or a combination of options, has no meaning."""

    exit_code = 2


class ModelError(LindepError):
    """The model file is missing, damaged, invalid, or uses what cannot be handled at all."""


class CalibrationError(LindepError):
    """The calibration data is missing, damaged, or does not fit the inputs of the model."""


class OutputError(LindepError):
    """A result cannot be written where it was asked for."""


class TimingError(LindepError):
    """A model cannot be timed: its process does not start, ends early, or cannot load or run it."""


class BudgetError(LindepError):
    """No plan meets all budgets."""

    exit_code = 3


class VerificationError(LindepError):
    """The result differs from the original by more than was allowed."""

    exit_code = 3


def one_line(error: Exception) -> str:
    """The first line of what a C++ library says, without error codes, source files and signatures."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    place = r"\S+\.(?:cc|cpp|cu|h):\d+ "
    trimmed = re.sub(place + r".*?\) (?:const )?(?=[A-Z])", "", text, count=1)
    return re.sub(place, "", trimmed) or text
