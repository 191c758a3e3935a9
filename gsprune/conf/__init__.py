"""Configuration every Hydra application in the environment sees: the group `pruner`, and `hydra/callbacks=gsprune`."""
