"""What holds for every test."""

import os
import signal

# Before anything imports torch: the models of the tests are small, and threads that wait for each other on busy cores
# made them up to ten times as slow. What is started from here inherits it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    # Started in the background of a shell without job control, a process ignores Ctrl-C and hands that on to what it
    # starts; the tests that press Ctrl-C mean a process in the foreground.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
