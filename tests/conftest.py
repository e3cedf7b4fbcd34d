"""What holds for every test."""

import signal


def pytest_configure() -> None:
    # Started in the background of a shell without job control, a process ignores Ctrl-C and hands that on to what it
    # starts; the tests that press Ctrl-C mean a process in the foreground.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
