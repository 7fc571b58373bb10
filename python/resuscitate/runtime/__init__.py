"""The run-time environment of a repair: ranks, memory budget, spilled values, threads and the journal."""
