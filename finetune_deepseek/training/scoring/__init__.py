"""How runs are scored: losses summed over all rows, ranks, and the base of the tasks' metrics."""
