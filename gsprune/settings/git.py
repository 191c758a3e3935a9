"""The commit of the user's own code."""

from __future__ import annotations

import os
import subprocess

__all__ = ["git_tags"]

SECONDS = 5  # that git may take


def git_tags(directory: str | os.PathLike[str]) -> dict[str, str]:
    """The commit of the repository that a directory lies in, and whether tracked files differ from it.

    Under MLflow's own name, which its column "Version" shows; empty without git, outside of a repository, and before
    its first commit.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    known = {} if changed is None else {"git.dirty": str(bool(changed)).lower()}
    return {"mlflow.source.git.commit": commit, **known}


def _git(directory: str | os.PathLike[str], *arguments: str) -> str | None:
    """What git prints; None where it fails."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", os.fspath(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=quiet, check=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
