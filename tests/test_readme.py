"""The README's code runs as it stands there, and what it says of the repository is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
LONG_RUNS = (ROOT / "docs" / "long_runs.md").read_text(encoding="utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_loop_of_ten_lines_makes_the_model_smaller() -> None:
    torch.manual_seed(0)
    (loop,) = [block for block in blocks("python") if "pruner.attach" in block]
    names: dict[str, object] = {}
    exec(loop, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Sequential)
    assert [tuple(p.shape) for p in model.parameters()] == [(32, 20), (32,), (2, 32), (2,)]


PAGE = (ROOT / "docs" / "trained_networks.md").read_text(encoding="utf8")
SNIPPETS = [
    *(block for block in blocks("python") if "gsprune.cut(" in block),
    *re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE),
]


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_trained_network_is_cut_as_the_page_says(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a network without training; in its own directory, where it may write."""
    if "import timm" in code:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(code, names)
    net, found = names["net"], names.get("cut") or names["sparse"]
    assert isinstance(net, torch.nn.Module)
    model = found.model  # type: ignore[attr-defined]
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    left = sum(p.numel() for p in model.parameters()) - zeros
    assert left < 0.98 * sum(p.numel() for p in net.parameters())


@pytest.mark.slow
def test_the_criterion_of_your_own_prunes(tmp_path: Path) -> None:
    """The file and the YAML of the README, beside the application's own configuration."""
    (code,) = [block for block in blocks("python") if "class Damage" in block]
    (yaml,) = blocks("yaml")
    (tmp_path / "my_criteria.py").write_text(code)
    (tmp_path / "pruner").mkdir()
    (tmp_path / "pruner" / "damage.yaml").write_text(yaml)
    overrides = (
        f"hydra.searchpath=[file://{tmp_path}] pruner=damage pruner.target_sparsity=0.75 model.width=4 tracking=none "
        f"trainer.dense_epochs=1 trainer.prune_epochs=2 trainer.latency_repeats=0 hydra.run.dir={tmp_path}/out"
    )
    run = train(tmp_path, *overrides.split(), PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "75.0 %" in run.stdout


def test_every_command_line_composes(compose_config: object) -> None:
    """Every `python train.py ...` of the README and of what it says of long runs, without running it."""
    found = re.findall(r"`python train\.py ([^`]+)`", README + LONG_RUNS)
    commands = [command for command in found if command != "pruner=damage"]  # not there yet
    assert len(commands) >= 10
    for command in commands:
        overrides = re.findall(r'"[^"]*"|\S+', command)
        plain = [override.strip('"') for override in overrides if not override.startswith("--")]
        if "--multirun" in command:
            plain = [override.split(",")[0] for override in plain]
        compose_config(*plain)  # type: ignore[operator]


def test_every_name_of_the_package_is_there_after_importing_it() -> None:
    """`gsprune.X.y` of the README and the docs, each in the form in which it is written, after `import gsprune`."""
    pages = [README, *(path.read_text(encoding="utf8") for path in sorted((ROOT / "docs").glob("*.md")))]
    names = sorted({name for page in pages for name in re.findall(r"(?<![\w/\[-])gsprune(?:\.[A-Za-z_]\w*)+", page)})
    assert {
        "gsprune.export.to_onnx",
        "gsprune.load_inc_config",
        "gsprune.start_run",
    } <= {*names}
    code = (
        "import gsprune, sys\n"
        "assert 'torch' not in sys.modules\n"
        "for name in sys.argv[1:]:\n"
        "    found = gsprune\n"
        "    for part in name.split('.')[1:]:\n"
        "        found = getattr(found, part)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "AGENTS.md"])
def test_links_pictures_and_paths_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`((?:gsprune|tests|benchmarks|conf)/[\w./]+)`", text):
        assert (ROOT / name).exists() or name == "conf/pruner/damage.yaml", name


def test_the_tree_names_every_folder() -> None:
    folders = {path.name for path in (ROOT / "gsprune").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^[├└]── (\w+)/", README, re.MULTILINE)) == folders
