"""The rules, one file each; kvmtrace.check.registry finds them."""
