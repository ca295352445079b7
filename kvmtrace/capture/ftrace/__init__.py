"""The ftrace back end: a tracing instance of its own, whose pages are moved to a trace.dat unread."""
