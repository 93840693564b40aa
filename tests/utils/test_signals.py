"""Signals end a command at once, or where it asks."""

import os
import signal

import pytest

from distill.utils import signals


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_outside_training_a_signal_ends_the_command(number):
    before = signal.getsignal(number)
    with pytest.raises(signals.Preempted, match=number.name), signals.heeded():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_in_training_it_waits_to_be_asked_and_the_first_counts():
    with signals.heeded():
        with signals.deferred():
            signals.stop_if_told()
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.pending()
        with pytest.raises(signals.Preempted, match="SIGUSR1"):
            signals.stop_if_told()
    with signals.heeded():
        assert not signals.pending()


def test_handlers_of_a_library_give_way():
    with signals.heeded(), signals.deferred():
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Lightning's own"))
        signals.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.pending()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_python_forgets_ends_training_at_its_next_batch():
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with signals.heeded():
        Finalised()
        for asked in (signals.raise_lost_interrupt, signals.stop_if_told):
            with pytest.raises(KeyboardInterrupt):
                asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with signals.heeded():
        signals.stop_if_told()
