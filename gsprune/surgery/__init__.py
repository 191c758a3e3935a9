"""The smaller network: the cut plan, applying it, the optimizer's state, and the proof that masked equals cut."""
