"""perf.data in file mode: layout, records, rows."""
