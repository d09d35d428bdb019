import os
import signal

from fewstep.training.signals import stop_signals


def test_first_signal_is_answered_at_once_and_only_the_first(capfd):
    """Fails if nothing is said until the checkpoint is written: an evaluation may take minutes before it."""
    with stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert "stopping after this iteration; saving" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
    assert caught == [signal.SIGINT, signal.SIGTERM]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
