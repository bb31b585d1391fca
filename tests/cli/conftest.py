from collections.abc import Callable

import pytest

from lightning_attention.cli.app import main


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Call the command line; its exit status, standard output and standard error."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call
