import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.kernels.triton.support.interpreter import Interpreter

# Tests run side by side, one process per core: threads of their own would only fight over the cores.
torch.set_num_threads(1)

# Derandomised: a run says the same thing twice. HYPOTHESIS_PROFILE=explore searches anew, ten times as long.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("explore", deadline=None, max_examples=250)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def interpreter() -> "Iterator[Interpreter]":
    from tests.kernels.triton.support.interpreter import Interpreter  # not without need: it imports Triton

    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would the tests of it and what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
