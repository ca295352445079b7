"""Encoders of the formats that kvmtrace decodes, written apart from the decoders."""
