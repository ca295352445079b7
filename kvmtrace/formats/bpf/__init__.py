"""The eBPF back end's capture file: layout and reading."""
