import hashlib
import os
import signal
import threading
import time

import pytest

from lightning_attention.errors import StoppedAtOnce
from lightning_attention.training.interrupt import StopRequest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_is_a_request_and_the_second_an_exception(name):
    before = [signal.getsignal(getattr(signal, n)) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    heard = []

    def stop_twice():
        with StopRequest(lambda *what: heard.append(what)) as stop:
            assert stop.signal_name is None
            send(name)
            assert stop.signal_name == name
            send(name)

    with pytest.raises(StoppedAtOnce) as caught:
        stop_twice()
    assert caught.value.signal_name == name
    assert isinstance(caught.value, KeyboardInterrupt)
    assert heard == [(name, False), (name, True)]
    assert [signal.getsignal(getattr(signal, n)) for n in ("SIGINT", "SIGTERM", "SIGHUP")] == before


def test_acknowledged_at_once_in_the_middle_of_a_long_call():
    """As in a step of a large model: Python's own handler runs only when the call returns."""
    heard = []
    with StopRequest(lambda *_: heard.append((time.perf_counter(), stop.signal_name))) as stop:
        timer = threading.Timer(0.1, lambda: send("SIGTERM"))
        timer.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # one call, about a second
        returned = time.perf_counter()
        timer.join()
        assert stop.signal_name == "SIGTERM"
    ((when, known),) = heard
    assert known is None
    assert when < returned - 0.1


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            send("SIGHUP")
            assert stop.signal_name is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def use():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [before]
