"""Signals that end a run: deferred in a step, never lost, and no handler stays behind."""

from __future__ import annotations

import pickle
import signal
import threading

import pytest

from gsprune.training.signals import Interrupted, Stop


def test_the_exit_of_a_worker_process_reaches_its_parent_as_it_was():
    again = pickle.loads(pickle.dumps(Interrupted(signal.SIGINT)))
    assert (again.code, str(again)) == (130, "stopped by SIGINT")


def test_signals_are_left_alone_where_they_are_ignored_and_in_other_threads():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    handlers = []

    def elsewhere():
        with Stop():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_a_signal_right_after_the_last_step_is_not_lost():
    with pytest.raises(Interrupted), Stop() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
