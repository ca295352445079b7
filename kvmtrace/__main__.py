"""`python -m kvmtrace`."""

from kvmtrace.cli.main import main

main()
