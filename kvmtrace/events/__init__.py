"""The event table: what every analysis reads."""
