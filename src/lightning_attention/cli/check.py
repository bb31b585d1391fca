"""``lightning-attention check``: does it give the right numbers on this machine?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lightning_attention.bench.render import Table
    from lightning_attention.check import Row


def check() -> None:
    """Compare every device and backend here with the definition in float64; exit status 1 if one is wrong.

    Takes a few seconds. Each line shows the worst of several quantities: the relative Frobenius error, and the
    budget that the rounding of the input type allows.
    """
    import platform

    import torch
    from rich.console import Console

    import lightning_attention
    from lightning_attention import check as checks
    from lightning_attention.bench.report import device_name, driver, package_version

    versions = {"lightning-attention": lightning_attention.__version__, "torch": torch.__version__,
                "triton": package_version("triton") or "none", "python": platform.python_version()}  # fmt: skip
    typer.echo("   ".join(f"{name} {version}" for name, version in versions.items()))

    devices = checks.devices()
    for device in devices:
        about = f", driver {driver()}" if device.type == "cuda" else ""
        typer.echo(f"{typer.style(device.type, bold=True)}  {device_name(device)}{about}")
        for backend, missing in checks.backends(device).items():
            default = ", the default" if backend == checks.choose(None, device) else ""
            state = f"not here: {missing}" if missing else f"available{default}"
            typer.echo(f"  {backend:<10} {state}")

    with Console().status("checking"):
        rows = [row for device in devices for row in checks.check(device)]
    lines = table(rows, several_devices=len(devices) > 1).lines()
    typer.echo("\n" + "\n".join(lines[: -len(rows)]))
    for line, row in zip(lines[-len(rows) :], rows, strict=True):
        typer.secho(line, fg=None if row.ok else "red")
    typer.echo("\nA budget is what rounding to the input type allows; docs/benchmarks.md derives it.")
    failed = sum(not row.ok for row in rows)
    if failed:
        typer.secho(f"{failed} of {len(rows)} checks failed", fg="red")
        raise typer.Exit(1)
    typer.echo(f"all {len(rows)} checks passed")


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
