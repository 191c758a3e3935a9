"""Sweeps: the callback and its record, the jobs' results, variants, the report, shared dense networks."""
