"""A sweep of the application: two pruners at two sparsities, the control, one report.

    python examples/sweep.py

The grid is the first list. The second makes the network small and the training short, for an example of seconds: leave
it out, and add seed=0,1,2, for a sweep to decide by.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRID = ["pruner=weighted,magnitude,none", "pruner.target_sparsity=0.5,0.9"]
QUICK = ["model.width=8", "trainer.dense_epochs=3", "trainer.prune_epochs=3", "trainer.latency_repeats=0"]

with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(ROOT / "train.py"), "--multirun", *GRID, *QUICK]
    command += ["tracking=none", "trainer.progress=none", f"hydra.sweep.dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    print(*sorted(path.name for path in Path(folder).iterdir() if path.is_file()))
    with Path(folder, "summary.csv").open(encoding="utf8") as file:
        for row in csv.DictReader(file):
            pruned, accuracy = f"{row['variant']} {row['pruner.target_sparsity']}", 100 * float(row["val_accuracy"])
            print(f"{pruned:<14} {accuracy:6.2f} %  {float(row['params_nonzero']):>6,.0f} parameters")
