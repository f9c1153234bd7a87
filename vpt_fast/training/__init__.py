"""Training and use of a run: recipe, loop, run folders, results, and what is particular to a problem."""
