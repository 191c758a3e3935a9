"""Names of the files that a run or a sweep writes into its directory."""

from __future__ import annotations

__all__ = ["RESULT"]

TRACKING, TRACKING_LOCK, SENDING = "tracking.json", "tracking.lock", "sending.jsonl"
SWEEP = "sweep.json"
RESULT = "result.json"
# Folders of a sweep directory that are no jobs; those of MLflow hold copies of the jobs' files.
NOT_JOBS = ("dense_cache", "mlartifacts", "mlruns", "__pycache__")
