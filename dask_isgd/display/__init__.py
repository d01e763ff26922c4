"""How a run is shown: in a terminal, in a notebook, as a plot."""
