"""The smaller network: the cut plan, applying it, the optimizer's state, and the proof that masked equals cut.

Trained on, a network is cut by `shrink` or step by step by a `Shrinker`; both compare the masked and the cut network.
"""
