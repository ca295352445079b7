"""Many recordings: each becomes a small summary that adds up exactly; outliers and cohorts are found over all."""
