"""What a signal asks of one of several processes is kept until all have agreed on it."""

import os
import signal

import pytest

from fivestep.interrupts import Terminated, agree, asked, noticed, poll, save_wanted


def test_a_signal_between_asking_and_agreeing_is_not_lost():
    with pytest.raises(Terminated), noticed():
        assert asked() == (0, False)
        os.kill(os.getpid(), signal.SIGTERM)
        agree(0, 0)  # the others knew of none
        poll()  # nobody leaves alone
        assert asked() == (signal.SIGTERM, False)
        agree(signal.SIGTERM, 0)
        poll()


def test_what_came_before_the_first_asking_waits_too():
    with pytest.raises(Terminated), noticed():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == (signal.SIGTERM, True)
        poll()  # nobody leaves alone, and nobody saves alone
        assert not save_wanted()
        agree(signal.SIGTERM, 1)
        assert save_wanted()
        poll()


def test_a_save_is_agreed_on():
    with noticed():
        asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not save_wanted()
        agree(0, 0)
        assert asked() == (0, True)
        agree(0, 1)
        assert save_wanted() and not save_wanted()


def test_what_another_was_asked_ends_this_one_too():
    with pytest.raises(KeyboardInterrupt), noticed():
        asked()
        agree(signal.SIGINT, 0)
        poll()


def test_a_save_that_is_agreed_on_outlasts_the_next_signal():
    with noticed():
        asked()
        agree(0, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert save_wanted()
        assert asked() == (0, True)
