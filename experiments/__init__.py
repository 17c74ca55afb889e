"""Research on top of it all: the comparison of methods, its tables and figures, position cues."""
