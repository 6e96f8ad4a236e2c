"""Prints what the fault tests of a run have found, as a table."""

from __future__ import annotations

import pytest
from helpers.repeats import TALLIES, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLIES:
        terminalreporter.section("faults")
        for line in table():
            terminalreporter.write_line(line)
