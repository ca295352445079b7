"""The reference model as data: states, transitions, expectations per exit reason."""
