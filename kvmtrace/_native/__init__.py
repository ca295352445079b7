"""The compiled loops: passes over records and events that NumPy would need many for, as functions on arrays.

`loops.h` declares every C function once; cffi compiles the C files into the module `_loops` (compiling.py), whose calls
release the GIL. The Python files beside them say what the arrays are. There is no other implementation in kvmtrace: the
NumPy twins in tests/native hold the loops to what they promise, on damaged input, too.
"""
