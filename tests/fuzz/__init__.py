"""Fuzzing of everything that reads a file: seeds, mutations, what must hold, and the loop."""
