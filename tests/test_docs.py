"""The code of the README and of the docs runs as it stands there, and what they say of the repository is so."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from jobs import train
from PIL import Image

import gsprune

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf8") for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["README.md"] = README


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def block(page: str, holding: str) -> str:
    (found,) = [code for code in blocks("python", page) if holding in code]
    return found


# ---- the README


def test_the_readme_is_short() -> None:
    """Words that a reader sees: headings, text, tables, names of links and pictures; not code blocks or addresses."""
    text = re.sub(r"^```.*?^```\n", "", README, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert 500 < len(words) <= 1200


def test_the_readme_begins_with_what_the_field_searches_for() -> None:
    beginning = " ".join(README.split()[:120]).lower()
    for term in (
        "prun",
        "taylor importance",
        "saliency",
        "structured and unstructured",
        "fine-tuning",
        "attention heads",
    ):
        assert term in beginning, term


# Instead of the network of the README: three of its blocks at a quarter of the width, for speed.
SMALLER = """
import torchvision
from torchvision.models import mobilenetv3

conf, _ = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)
torchvision.models.mobilenet_v3_small = lambda **of: mobilenetv3.MobileNetV3(conf[:3], 64, **of)
"""


@pytest.mark.slow
def test_the_readme_cuts_a_network_on_pictures_and_another_process_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(24):
        for split in ("train", "test"):
            path = tmp_path / "pictures" / split / "abcd"[number % 4] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (48, 48, 3), generator=torch.Generator().manual_seed(number)).byte()
            Image.fromarray(noise.numpy()).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "mobilenet_v3_small", torchvision.models.mobilenet_v3_small)  # goes back
    exec(SMALLER, {})
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=4).state_dict(), "mobilenet.pt")
    exec(block("README.md", "# prune.py"), {})
    said = capsys.readouterr().out
    assert re.search(r"MACs .* -> .*\((49|50)\.\d %\)", said)
    assert "24 samples" in said
    assert (tmp_path / "smaller.onnx").exists()
    code = SMALLER + block("README.md", "# reload.py")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size([1, 4])" in run.stdout, run.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/train_and_prune.md"])
def test_the_loop_makes_the_model_smaller(page: str) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(block(page, "model = pruner.finish()"), names)
    model = names["model"]
    assert isinstance(model, torch.nn.Sequential)
    assert [tuple(p.shape) for p in model.parameters()] == [(32, 20), (32,), (2, 32), (2,)]


# ---- the pages

EXAMPLES = ("resnet", "bert", "llama", "yolo", "timm_train", "torchvision_train", "sweep")

ELSEWHERE = ("# prune.py", "# reload.py", "class Damage")  # run by tests of their own
SNIPPETS = [
    pytest.param(code, id=f"{Path(page).stem}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks("python", page))
    if not any(mark in code for mark in ELSEWHERE)
]


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own directory, where it may write. What it cuts is smaller then, or has zeros."""
    partners = ("accelerate", "huggingface_hub", "lightning", "peft", "skorch", "timm", "transformers")
    for name in (*partners, "onnxruntime", "sklearn"):
        if re.search(rf"^(import|from)\b.*\b{name}\b", code, re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "snippet"}
    exec(code, names)
    net, cuts = names.get("net"), [names[name] for name in ("cut", "sparse") if name in names]
    for cut in cuts if isinstance(net, torch.nn.Module) else []:
        model = cut.model  # type: ignore[attr-defined]
        left = sum(int(p.count_nonzero()) for p in model.parameters())
        assert left < 0.98 * sum(p.numel() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_its_page_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line; numbers may differ, with the machine and the version of torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    if name == "sweep":  # its command, in a process that has made the imports
        monkeypatch.setattr(subprocess, "run", lambda command, cwd, **_: train(Path(cwd), *command[2:]))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    shown = re.search(
        rf"\(\.\./examples/{name}\.py\).*?^```text\n(.*?)^```", PAGES["docs/examples.md"], re.DOTALL | re.M
    )
    assert shown is not None
    said = capsys.readouterr().out
    masked, found = (re.sub(r"-?\d[\d.,]*(e-\d+)?", "#", text).splitlines() for text in (shown[1], said))
    assert found == masked


def test_every_example_is_there() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES}


def test_the_reference_has_every_public_name() -> None:
    """And every file that `train.py` composes, but experiments, samplers and the two modes."""
    listed = set(re.findall(r"^- `gsprune\.(\S+)`$", PAGES["docs/reference/library.md"], re.MULTILINE))
    public = {name for name in gsprune.__all__ if not name.startswith("_")}
    bases = {"Activations", "GateGradient"}
    public |= {f"criteria.{name}" for name in gsprune.criteria.__all__ if name not in bases}
    assert public - listed == set()
    files = set(re.findall(r"^- `(conf/\S+)`$", PAGES["docs/reference/settings.md"], re.MULTILINE))
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
    left = {path for path in here - files if not re.search(r"/(experiment|sampler|mode)/|pareto_macs", path)}
    assert left == set()


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    tree = ast.parse((ROOT / "docs" / "build_site.py").read_text(encoding="utf8"))
    found = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    pages = " ".join(ast.literal_eval(found["NAVIGATION"]).values()).split()
    beside = {page.removesuffix(".md") for page in ast.literal_eval(found["BESIDE"]).values()}
    here = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page != "README.md"}
    assert sorted(pages) == sorted((here | beside) - {"index"})


def test_the_reader_from_elsewhere_finds_each_call_in_a_program() -> None:
    """Right-hand column: every call of gsprune stands in the program of its section, which runs (above)."""
    sections = re.split(r"^## ", PAGES["docs/coming_from.md"], flags=re.MULTILINE)[1:]
    assert len(sections) == 7
    for section in sections:
        (program,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        flat = " ".join(program.split())
        rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| .*$", section, re.MULTILINE)][1:]
        calls = [
            call
            for row in rows
            for call in re.findall(r"`([^`]*gsprune\.[^`]*|[^`]*Pruner[.(][^`]*|cut\.[^`]*)`", row[1])
        ]
        assert len(rows) >= 3
        assert len(calls) >= 1
        for call in calls:
            assert call in flat, call


@pytest.mark.slow
def test_the_criterion_of_your_own_prunes(tmp_path: Path) -> None:
    """The file and the YAML of the page, beside the application's own configuration."""
    (yaml,) = blocks("yaml", "docs/train_and_prune.md")
    (tmp_path / "my_criteria.py").write_text(block("docs/train_and_prune.md", "class Damage"))
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
    """Every `python train.py ...` of all pages, in a sentence or on a line of a block, without running it."""
    commands = []
    for page in PAGES.values():
        commands += [" ".join(found.split()) for found in re.findall(r"`python train\.py ([^`]+)`", page)]
        lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
        commands += re.findall(r"^python train\.py +([^#\n]+?) *(?:#.*)?$", lines, re.MULTILINE)
    known = [line for line in commands if not re.search("damage|--help|--cfg", line)]  # the first: not there yet
    assert len(known) >= 40
    for command in dict.fromkeys(known):
        overrides = re.findall(r""""[^"]*"|'[^']*'|\S+""", command)
        plain = [override.strip("\"'") for override in overrides if not override.startswith("--")]
        if any(key in command for key in ("hydra/", "hydra.")):
            continue  # launchers and sweepers are composed by Hydra itself: tests/conf and tests/sweeps do it
        if "--multirun" in command or "digits_sweep" in command:
            plain = [override if "[" in override else override.split(",")[0] for override in plain]
        compose_config(*plain)  # type: ignore[operator]


def test_every_name_of_the_package_is_there_after_importing_it() -> None:
    """`gsprune.X.y` of the README and the docs, each in the form in which it is written, after `import gsprune`."""
    names = sorted(
        {
            name
            for page in PAGES.values()
            for name in re.findall(r"(?<![\w/\[-])(?<!from )gsprune(?:\.[A-Za-z_]\w*)+", page)
        }
    )
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


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "AGENTS.md", "benchmarks/README.md", *sorted(PAGES)])
def test_links_pictures_and_paths_are_there(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text):
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, (target, anchor)
    for name in re.findall(r"`((?:gsprune|tests|benchmarks|conf|docs|examples)/[\w./]+)`", text):
        assert (ROOT / name).exists() or name == "conf/pruner/damage.yaml", name


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_the_tree_names_every_folder() -> None:
    folders = {path.name for path in (ROOT / "gsprune").iterdir() if (path / "__init__.py").exists()}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    assert set(re.findall(r"^[├└]── (\w+)/", text, re.MULTILINE)) == folders
