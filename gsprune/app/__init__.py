"""The reference application: one Hydra job from the composed configuration to its result."""

from gsprune.extras import need

need("rich")
