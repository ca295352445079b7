"""The reference model as text, JSON, DOT and SVG."""
