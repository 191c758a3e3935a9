"""Configuration every Hydra application in the environment sees (`pkg://gsprune.conf`): only the group `pruner`."""
