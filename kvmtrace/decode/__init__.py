"""Bytes to records: format text, ring-buffer pages, trace.dat, perf.data, our captures. No KVM semantics."""
