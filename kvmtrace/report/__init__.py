"""The report document and its renderers."""
