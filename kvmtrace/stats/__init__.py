"""Statistics of a recording: exits, userspace, vCPUs, details, and the tables of `perf kvm stat`."""
