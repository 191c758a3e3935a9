"""Names of the files that a run or a sweep writes into its directory."""

from __future__ import annotations

__all__ = ["RESULT"]

RESULT = "result.json"
PROGRAM, SIGNATURE = "model.pt2", "signature.json"  # a program, named as MLflow looks for it, and an entry of that
CONFIG, METRICS = "config.yaml", "metrics.jsonl"
TRACKING, TRACKING_LOCK, OUTBOX = "tracking.json", "tracking.lock", "outbox.jsonl"
UNSENT, SENDING = "unsent.jsonl", "sending.jsonl"  # which earlier versions wrote in place of the outbox
SWEEP = "sweep.json"
SWEEP_RUN = ".gsprune"  # the folder in which a sweep keeps the record of its parent run
# Folders of a sweep directory that are no jobs; those of MLflow hold copies of the jobs' files.
NOT_JOBS = ("dense_cache", "mlartifacts", "mlruns", "__pycache__")
