"""One file, one experiment: its definition, the plan of its steps, running them, and a row of Table 1."""
