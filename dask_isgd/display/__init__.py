"""A run as people see it: in a terminal, in a notebook, as a plot."""
