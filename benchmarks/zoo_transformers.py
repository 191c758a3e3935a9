"""transformers' networks of the table in docs/networks.md, with random weights and two layers.

The library is not imported before a network is built.
"""

from __future__ import annotations

from zoo_vision import Entry

NETWORKS: dict[str, Entry] = {}
