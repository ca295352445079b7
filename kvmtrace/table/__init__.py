"""The event table: one row per recorded event, as columns, and how its fields are read."""
