"""`python -m lightning_attention.cli`: the command, begun again where PyTorch has been loaded too early."""

import os
import sys

from lightning_attention_command import main, sleep_while_waiting

if sleep_while_waiting() and os.name == "posix":
    os.execv(sys.executable, sys.orig_argv)
main()
