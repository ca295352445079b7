"""The rules, one file each; kvmtrace.check.rule_registry finds them."""
