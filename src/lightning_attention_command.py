"""The start of the command `lightning-attention`: what must happen before PyTorch is loaded.

It is no part of the package because to import any part of a package is to import the whole, and PyTorch with it.
"""

from __future__ import annotations

import os
import sys


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    open_missing_streams()
    sleep_while_waiting()
    try:
        from lightning_attention.cli.app import main as run

        run(args)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "typer" and (sys.argv[1:] if args is None else args) == ["check"]:
            from lightning_attention.cli.check import check

            check()
            return
        if missing in ("", "lightning_attention"):
            raise
        print(f"error: this needs {missing}: pip install 'lightning-attention[all]'", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # while modules are loaded; the commands have their own ways to stop
        sys.exit(130)


def open_missing_streams() -> None:
    """Read nothing and write nowhere where the process was started with a standard stream closed.

    Before anything else is opened: it would get that stream's number, and what is printed there would go into it.
    """
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open as long as the process)


def sleep_while_waiting() -> bool:
    """Let PyTorch's threads wait asleep, unless the user has said how they are to wait; whether that is new.

    OpenMP reads it when it is loaded. Threads that wait awake made a training step take 4.5 s for 0.4 s where something
    else ran on the cores.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True


if __name__ == "__main__":
    main()
