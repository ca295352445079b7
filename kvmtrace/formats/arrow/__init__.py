"""Parquet and Arrow files of `kvmtrace export`: writing and reading."""
