"""`python -m fivestep` and the command `fivestep`: until the modules are there, a Ctrl-C ends the process at once."""

import signal


def start() -> None:
    """Load the command line and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fivestep.cli import main

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    main()


if __name__ == "__main__":
    start()
