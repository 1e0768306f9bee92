"""The parts of the nightly run: what each checks, the session of noxfile.py that runs it, and what it reports."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A session of noxfile.py.

    what: for the table; counted: a pattern of the output whose group is the number of checks that ran; unit: of that
    number; noted: a pattern whose group is worth keeping.
    """

    session: str
    what: str
    counted: str
    unit: str
    noted: str = r"(?!)"

    def outcome(self, status: int, output: str) -> str:
        """Return "passed", "failed", or "skipped" where nothing ran. A run that reports no number has failed."""
        if status != 0:
            return "failed"
        if self.count(output) > 0:
            return "passed"
        return "skipped" if re.search(r"\d+ skipped", output) else "failed"

    def count(self, output: str) -> int:
        """Return how many checks ran: the sum over all reports, since a session may run several commands."""
        return sum(int(found) for found in re.findall(self.counted, output))

    def note(self, output: str) -> str:
        return ", ".join(re.findall(self.noted, output))


PARTS = (
    Part(
        "fuzz",
        "drawn calls, compared with torch and with extended precision",
        r"(?m)^(\d+) cases in",
        "cases",
        noted=r"(?m)^(seed \d+):",
    ),
    Part(
        "threads",
        "the CPU kernels on several threads under ThreadSanitizer, and planted races, which it reports",
        r"100% tests passed(?:, 0 tests failed)? out of (\d+)",  # CTest 4 leaves the failures out where there are none
        "programs",
    ),
    Part(
        "bindings",
        "the extension built with AddressSanitizer under the tests of ops and of the function, and a planted overrun, "
        "which it reports",
        r"(?m)^(?:=+ )?(\d+) passed",
        "tests",
        noted=r"(?m)^(instruction set \S+)$",
    ),
    Part(
        "large",
        "more than 2^31 elements on the CPU, forward and backward, every element compared with float64",
        r"(?m)^(?:=+ )?(\d+) passed",
        "tests",
    ),
)
