"""The file of `kvmtrace record --summary`."""
