"""Real data for tests, and the mark of the tests that need them."""

import os

import pytest
from protocol import load, read

__all__ = ["load", "needs_data", "read"]
needs_data = pytest.mark.skipif("NEURST_DATA" not in os.environ, reason="NEURST_DATA names no folder of real data")
