"""The Hydra plugin of gsprune."""
