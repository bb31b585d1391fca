"""An error against its budget, as a record says it."""

from typing import Any


def within(budget: float, error: float) -> dict[str, Any]:
    """The relative error as fields of a record; one past its budget makes the record a failure."""
    wrong = {} if error <= budget else {"error": f"relative error {error:.1e}, allowed {budget:.0e}"}
    return {"relative_error": error} | wrong
