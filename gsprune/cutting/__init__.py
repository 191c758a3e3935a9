"""A trained network cut now: scored on a few batches, cut, repaired; how much may go, and how sure that is."""
