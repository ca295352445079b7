"""`kvmtrace view`: a recording's report with a timeline that is read from the recording, on this machine only."""
