"""Test suites under the recorder: what tests there are, running each, checking what was recorded of it."""
