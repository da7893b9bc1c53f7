from __future__ import annotations

import signal

import pytest

from spattention.cli.interrupt import Interrupts


class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_own_handler")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruption_in_a_finalizer_is_kept():
    """An interruption during a finalizer is not lost."""
    with Interrupts() as interrupts:
        interrupts.check()
        Finalized()  # Python prints the exception, and goes on
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("pythons_own_handler")
def test_an_interruption_is_raised_at_once():
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_another_handler_is_left_alone(pythons_own_handler):
    def own(number, frame):
        raise AssertionError

    signal.signal(signal.SIGINT, own)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) is own
    assert signal.getsignal(signal.SIGINT) is own
