"""Everything that makes text: terminal, HTML, Perfetto, the model as text and picture."""
