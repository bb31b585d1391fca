"""``lightning-attention check``: does it give the right numbers on this machine? It needs PyTorch alone."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_attention.bench.render import Table
    from lightning_attention.check import Row

BOLD, RED = 1, 31  # as terminals number them


def check() -> None:
    """Compare every device and backend here with the definition in float64; exit status 1 if one is wrong.

    Takes a few seconds. Each line shows the worst of several quantities: the relative Frobenius error, and the
    budget that the rounding of the input type allows.
    """
    import platform

    import torch

    import lightning_attention
    from lightning_attention import check as checks
    from lightning_attention.bench.report import device_name, driver, package_version

    versions = {"lightning-attention": lightning_attention.__version__, "torch": torch.__version__,
                "triton": package_version("triton") or "none", "python": platform.python_version()}  # fmt: skip
    print("   ".join(f"{name} {version}" for name, version in versions.items()))

    devices = checks.devices()
    for device in devices:
        about = f", driver {driver()}" if device.type == "cuda" else ""
        print(f"{_styled(device.type, BOLD)}  {device_name(device)}{about}")
        for backend, missing in checks.backends(device).items():
            default = ", the default" if backend == checks.choose(None, device) else ""
            state = f"not here: {missing}" if missing else f"available{default}"
            print(f"  {backend:<10} {state}", flush=True)

    rows = [row for device in devices for row in checks.check(device)]
    lines = table(rows, several_devices=len(devices) > 1).lines()
    print("\n" + "\n".join(lines[: -len(rows)]))
    for line, row in zip(lines[-len(rows) :], rows, strict=True):
        print(line if row.ok else _styled(line, RED))
    print("\nA budget is what rounding to the input type allows; docs/benchmarks.md derives it.")
    failed = sum(not row.ok for row in rows)
    if failed:
        print(_styled(f"{failed} of {len(rows)} checks failed", RED))
        sys.exit(1)
    print(f"all {len(rows)} checks passed")


def _styled(text: str, style: int) -> str:
    """The text in a style, on a terminal whose user has not asked for plain text."""
    return f"\x1b[{style}m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def table(rows: list[Row], several_devices: bool) -> Table:
    """One line a row, with the reason in place of the numbers where there are none."""
    from lightning_attention.bench.render import Table

    cells = []
    for row in rows:
        backend = f"{row.backend} ({row.device})" if several_devices else row.backend
        dtype = str(row.dtype).removeprefix("torch.")
        numbers = (row.worst, f"{row.error:.1e}", f"{row.budget:.1e}")
        if row.failure is not None:
            numbers = (" ".join(row.failure.split()), "–", "–")
        cells.append([backend, dtype, row.what, *numbers, "yes" if row.ok else "NO"])
    columns = ("backend", "dtype", "what", "worst", "error", "budget", "ok")
    return Table("Relative Frobenius error against float64", columns, cells, words=4)
