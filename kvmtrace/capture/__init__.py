"""Privileged recorders. They write a capture and never analyse. No numpy here; bcc only in bpf modules."""
