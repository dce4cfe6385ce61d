"""What a check or a measurement found."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One row of the table."""

    name: str
    """Name of the check or the measurement."""

    value: float | None
    """Number that was found; None if there is none on this device."""

    unit: str
    """Unit of the number."""

    passed: bool | None = None
    """Whether the check passed; None for a measurement."""

    note: str = ""
    """What the number is compared with, or why there is none."""

    def line(self) -> str:
        """Return the row."""
        value = "" if self.value is None else f"{self.value:.4g}"
        passed = {None: "", True: "passed", False: "FAILED"}[self.passed]
        return f"| {self.name} | {value} | {self.unit} | {passed} | {self.note} |"

    def fields(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)
