"""Always on: the flight recorder and the exporter."""
