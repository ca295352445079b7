"""Pure vocabulary of KVM: numbers and names, each citing its header. Imports nothing of kvmtrace."""
