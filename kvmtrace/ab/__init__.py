"""Two recordings, or two sets of them, compared with significance."""
