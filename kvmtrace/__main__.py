"""`kvmtrace` and `python -m kvmtrace`: Ctrl-C ends it with one line from here on, whatever is imported."""

import os
import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from kvmtrace.cli.main import main as run_command

    run_command()


def _leave(number: int, frame: object) -> None:  # noqa: ARG001 (signal's signature)
    """End at once: before the command has begun, and behind its end."""
    os.write(2, b"kvmtrace: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
