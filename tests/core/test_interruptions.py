import os
import signal
import threading

import pytest

from physformer_core.interruptions import held_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end(number):
    class Stopped(Exception):
        pass

    def stop(_number, _frame):
        raise Stopped

    before = signal.signal(number, stop)
    done = []
    try:
        with pytest.raises(Stopped), held_back():
            os.kill(os.getpid(), number)
            done.append("noted")
        assert done == ["noted"]
        assert signal.getsignal(number) is stop
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 0)
    finally:
        signal.signal(number, before)


def test_an_error_inside_is_kept_with_the_signal():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt) as caught, held_back():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("the disk is full")
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_are_left_alone():
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler] and signal.getsignal(signal.SIGINT) is handler
