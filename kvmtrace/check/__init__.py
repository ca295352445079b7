"""A recording held against the reference model: the engine, the rules, the verdict."""
