"""Hydra finds this plugin by itself, in every application of the environment. Imports neither torch nor mlflow."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from gsprune.conf.schemas import register


class GsprunePlugin(SearchPathPlugin):
    """Adds the group `pruner` behind the application's own configuration, and the schemas that check it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="gsprune", path="pkg://gsprune.conf")
        register()
