"""The library works without the packages of the extras, and what needs one names it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gsprune.extras import EXTRAS, OLDEST, MissingExtraError, check_command, distribution, need

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
APPLICATION = ("hydra", "hydra_plugins", "omegaconf", "yaml", *EXTRAS["app"])
BLOCK = """
import sys

BLOCKED = set(sys.argv.pop(1).split(","))

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
LIBRARY = """
import torch
from torch import nn
import gsprune
from gsprune.criteria import Elementwise, Weighted
from gsprune.forecast.predict import plan
from gsprune.formats.scores import load_scores, save_scores

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def train(model, pruner):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for _ in range(4):
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return pruner.finish()

inputs, labels = torch.randn(16, 4), torch.randint(2, (16,))
wanted = {"target_sparsity": 0.5, "steps_per_epoch": 2, "epochs": 2}

model = network()
pruner = gsprune.Pruner(model, Elementwise(), **wanted)
model = train(model, pruner)
assert sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2) == (4 * 8 + 8 * 2) // 2
gsprune.save_masks("masks.safetensors", pruner.masks())
assert {name: int(mask.sum()) for name, mask in gsprune.load_masks("masks.safetensors").items()} == {
    name: int(mask.sum()) for name, mask in pruner.masks().items()
}
gsprune.save_pruned("zeros", model, None)
again = gsprune.load_pruned("zeros", network())
assert torch.equal(again(inputs), model(inputs))
assert "gsprune.discovery.find" not in sys.modules, "single weights need no trace"

model = network()
pruner = gsprune.Pruner(model, Weighted(), example_input=inputs[:1], **wanted)
(rule,) = plan(model, pruner, inputs[:1]).rules
assert [(entry.name, entry.total, entry.kept) for entry in rule.entries] == [("0", 8, 4)]
model = train(model, pruner)
assert [tuple(p.shape) for p in model.parameters()] == [(4, 4), (4,), (2, 4), (2,)]
save_scores("scores.safetensors", {"0": torch.arange(8.0)}, criterion="weighted", steps=4)
assert torch.equal(load_scores("scores.safetensors").scores["0"], torch.arange(8.0))
gsprune.save_pruned("smaller", model, pruner.plan)
assert torch.equal(gsprune.load_pruned("smaller", network())(inputs), model(inputs))
assert "gsprune.discovery.find" in sys.modules
assert BLOCKED.isdisjoint(sys.modules)
"""


def run(code: str, *arguments: str, blocked: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + code, ",".join(blocked), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_library_prunes_cuts_saves_and_loads_without_the_applications_packages(tmp_path: Path) -> None:
    done = run(LIBRARY, blocked=(*APPLICATION, "timm"), folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_extras_bring_what_they_are_named_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"sklearn": "scikit-learn"}
    for extra, modules in EXTRAS.items():
        listed = "\n".join(project["optional-dependencies"][extra])
        for module in modules:
            top = module.rpartition(".")[2].replace("_", "-")
            assert names.get(top, top) in listed
    own = {text.split(">")[0] for text in project["dependencies"]}
    assert own == {"hydra-core", "numpy", "omegaconf", "safetensors", "torch"}
    texts = [text for extra in ("test", "dev") for text in project["optional-dependencies"][extra]]
    inner = {name for text in texts if (found := re.match(r"gsprune\[(.*)\]", text)) for name in found[1].split(",")}
    assert {"app", "test"} <= inner


def test_what_needs_an_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError) as caught:
            need(module)
        assert "matplotlib" in str(caught.value)
        assert "'gsprune[app]'" in str(caught.value)


def test_a_package_that_lacks_something_itself_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "optuna.py").write_text("import no_such_package_here")
    monkeypatch.delitem(sys.modules, "optuna", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_here") as caught:
        need("optuna")
    assert not isinstance(caught.value, MissingExtraError)


CALLS = {
    "start_run": "import gsprune; gsprune.start_run()",
    "digits": "from gsprune.zoo.datasets import digits; digits()",
    "resnet18": "from gsprune.zoo.models import resnet18; resnet18(image_size=8, in_channels=1, num_classes=2)",
    "figures": "from gsprune.plots.drawing import new_figure; new_figure(1, 1)",
    "lock": "from pathlib import Path; from gsprune.files.locks import Lock; Lock(Path('a.lock')).acquire()",
    "app": "import gsprune.app",
    "to_onnx": "import gsprune.export; gsprune.export.to_onnx(None, 'a.onnx', None)",
    "bert": "from gsprune.zoo import hf; hf.transformers()",
}


def test_each_part_of_the_application_names_the_extra(tmp_path: Path) -> None:
    """All in one process, each on its own."""
    code = f"""
for name, call in {CALLS!r}.items():
    try:
        exec(call, {{}})
    except ValueError as error:
        print(name, str(error).count("pip install 'gsprune["), str(error).rpartition("[")[2])
"""
    done = run(code, blocked=(*EXTRAS["app"], *EXTRAS["hf"], *EXTRAS["onnx"]), folder=tmp_path)
    extras = {"to_onnx": "onnx]'", "bert": "hf]'"}
    assert done.stdout.splitlines() == [f"{name} 1 {extras.get(name, repr('app]')[1:])}" for name in CALLS], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "sync"])
def test_commands_name_the_extra(command: str, tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "0"
    (job / ".hydra").mkdir(parents=True)
    (job / "result.json").write_text('{"status": "finished", "accuracy": 0.5, "val_accuracy": 0.5, "params": 10}')
    (job / "tracking.json").write_text('{"status": "FINISHED", "record": "x", "tracking_uri": "sqlite:///a.db"}')
    (job / "unsent.jsonl").write_text('{"kind": "tags", "tags": {"a": "b"}}\n')
    code = f"from gsprune.cli import main; sys.exit(main([{command!r}, 'sweep']))"
    done = run(code, blocked=("jinja2", "matplotlib", "mlflow"), folder=tmp_path)
    assert done.returncode == 1
    assert "pip install 'gsprune[app]'" in done.stderr, done.stdout
    assert "Traceback" not in done.stderr


def test_the_command_names_the_extra_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(["seed=0", "+a=hydra/launcher=ray"])
    for launcher, module, extra in (
        ("joblib", "hydra_plugins.hydra_joblib_launcher", "joblib"),
        ("slurm", "hydra_plugins.hydra_submitit_launcher", "slurm"),
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher", "slurm"),
        ("ray_cluster", "hydra_plugins.hydra_ray_launcher", "ray"),
    ):
        monkeypatch.setattr("gsprune.extras.is_installed", lambda name, missing=module: name != missing)
        with pytest.raises(MissingExtraError) as caught:
            check_command([f"hydra/launcher={launcher}"])
        assert module.partition(".")[2].replace("_", "-") in str(caught.value)
        assert f"'gsprune[{extra}]'" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["rich", "sklearn"])
def test_training_without_the_application_ends_in_a_sentence(module: str, tmp_path: Path) -> None:
    """`rich` is missed before Hydra starts, scikit-learn by the job that reads its digits."""
    code = f"import runpy; sys.argv[0] = 'train.py'; runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    done = run(code, "tracking=none", "hydra.run.dir=out", blocked=(module,), folder=tmp_path)
    assert done.returncode == 1
    assert "pip install 'gsprune[app]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("version", "refuses"), [("1.0.30", True), ("1.0.9rc1", True), ("1.0.31", False), ("1.1", False)]
)
def test_a_partner_that_is_too_old_is_refused(
    version: str, refuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "partner.py").write_text(f"__version__ = {version!r}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "partner", raising=False)
    monkeypatch.setitem(OLDEST, "partner", "1.0.31")
    if not refuses:
        assert need("partner").__version__ == version
        return
    with pytest.raises(MissingExtraError) as caught:
        need("partner")
    assert all(fact in str(caught.value) for fact in (f"partner {version}", "too old", "1.0.31", "pip install"))


def test_the_oldest_releases_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {found for extra in extras.values() for found in extra}
    for package, oldest in OLDEST.items():
        assert any(line.startswith(f"{distribution(package).replace('_', '-')}>={oldest},<") for line in declared)
