"""``lightning-attention check``: does it give the right numbers on this machine?"""

import typer


def check() -> None:
    """Compare every device and backend here with the definition in float64; exit status 1 if one is wrong.

    Takes a few seconds. Each line shows the worst of several quantities: the relative Frobenius error, and the
    budget that the rounding of the input type allows.
    """
    import platform

    import torch
    from rich.console import Console

    import lightning_attention
    from lightning_attention.bench import check as checks
    from lightning_attention.bench.report import device_name, driver, package_version
    from lightning_attention.bench.tables import check_table

    console = Console()
    versions = {"lightning-attention": lightning_attention.__version__, "torch": torch.__version__,
                "triton": package_version("triton") or "none", "python": platform.python_version()}  # fmt: skip
    console.print("   ".join(f"{name} {version}" for name, version in versions.items()), highlight=False)

    devices = checks.devices()
    for device in devices:
        about = f", driver {driver()}" if device.type == "cuda" else ""
        console.print(f"[bold]{device.type}[/bold]  {device_name(device)}{about}", highlight=False)
        for backend, missing in checks.backends(device).items():
            default = ", the default" if backend == checks.choose(None, device) else ""
            state = f"not here: {missing}" if missing else f"available{default}"
            console.print(f"  {backend:<10} {state}", highlight=False, markup=False)

    with console.status("checking"):
        rows = [row for device in devices for row in checks.check(device)]
    console.print(check_table(rows, several_devices=len(devices) > 1))
    console.print("A budget is what rounding to the input type allows; docs/benchmarks.md derives it.", highlight=False)
    failed = sum(not row.ok for row in rows)
    if failed:
        console.print(f"[red]{failed} of {len(rows)} checks failed[/red]", highlight=False)
        raise typer.Exit(1)
    console.print(f"all {len(rows)} checks passed", highlight=False)
