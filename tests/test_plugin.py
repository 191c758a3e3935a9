"""The plugin is found by somebody else's Hydra application, from another directory, however gsprune was installed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
LIBRARIES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]

APP = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    import gsprune
    print(gsprune.__file__)
    print(sorted({"torch", "mlflow"} & set(sys.modules)))

main()
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "HYDRA_"))}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)


def environment(folder: Path) -> Path:
    """A virtual environment that sees the libraries of this one but not what this one installed as editable.

    The folder of libraries is named in a path file; path files inside that folder are then not read.
    """
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    (site / "libraries.pth").write_text("\n".join(LIBRARIES))
    return python


def install(python: Path, *what: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    done = run(*pip, "--no-build-isolation", "--disable-pip-version-check", *what, cwd=python.parent)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )  # --no-isolation: nothing is downloaded
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["editable", "wheel"])
def installed(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The interpreter of a fresh environment that has gsprune, and where its copy of gsprune must lie."""
    folder = tmp_path_factory.mktemp(request.param)
    python = environment(folder / "venv")
    install(python, *(["-e", ROOT] if request.param == "editable" else [wheel]))
    return python, ROOT if request.param == "editable" else folder


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP)
    return tmp_path / "app.py"


@pytest.mark.slow
def test_another_application_finds_the_group(installed: tuple[Path, Path], app: Path) -> None:
    python, home = installed
    done = run(python, app, "+pruner=weighted", "pruner.target_sparsity=0.25", "--cfg", "job", cwd=app.parent)
    assert done.returncode == 0, done.stderr
    pruner = OmegaConf.create(done.stdout).pruner
    assert pruner.criterion._target_ == "gsprune.criteria.Weighted"
    assert pruner.target_sparsity == 0.25

    done = run(python, app, cwd=app.parent)
    file, heavy = done.stdout.splitlines()
    assert Path(file).is_relative_to(home.resolve())
    assert heavy == "[]"


@pytest.mark.slow
def test_the_search_path_comes_after_the_applications_own(installed: tuple[Path, Path], app: Path) -> None:
    done = run(installed[0], app, "--info", "searchpath", cwd=app.parent)
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "|" in line]
    providers = [row[1] for row in rows]
    assert ["gsprune", "pkg://gsprune.conf"] in [row[1:3] for row in rows]
    assert providers.index("hydra") < providers.index("gsprune") < providers.index("schema")


@pytest.mark.slow
def test_help_lists_the_options_and_hides_the_schemas(installed: tuple[Path, Path], app: Path) -> None:
    done = run(installed[0], app, "--help", cwd=app.parent)
    groups = Path(__file__).parents[1] / "gsprune" / "conf" / "pruner"
    assert f"pruner: {', '.join(sorted(path.stem for path in groups.glob('*.yaml')))}\n" in done.stdout
    assert "pruner/schedule: cosine, cubic, exponential, linear, one_shot\n" in done.stdout
    assert "gsprune_" not in done.stdout


@pytest.mark.slow
def test_a_misspelt_key_is_refused_in_another_application(installed: tuple[Path, Path], app: Path) -> None:
    done = run(installed[0], app, "+pruner=abs", "pruner.sparsityy=0.9", cwd=app.parent)
    assert done.returncode == 1
    assert "Key 'sparsityy' not in 'PrunerConfig'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    any((Path(path) / "gsprune").exists() for path in LIBRARIES), reason="gsprune lies among the shared libraries"
)
def test_without_gsprune_there_is_no_group(tmp_path: Path, app: Path) -> None:
    """The environments of these tests are separate: what they find is what was installed into them."""
    python = environment(tmp_path / "venv")
    assert "pruner" not in run(python, app, "--help", cwd=tmp_path).stdout
    assert "No module named 'gsprune'" in run(python, app, cwd=tmp_path).stderr


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_the_plugin_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"gsprune", "hydra_plugins", "gsprune-0.1.0.dist-info"}
    assert {"gsprune/py.typed", "gsprune/conf/pruner/abs.yaml", "gsprune/conf/pruner/schedule/cubic.yaml"} <= {*names}
    assert "hydra_plugins/gsprune/search_path.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert "gsprune-0.1.0.dist-info/licenses/LICENSE" in names


@pytest.mark.parametrize("module", ["gsprune", "gsprune.conf.schemas", "hydra_plugins.gsprune.search_path"])
def test_importing_is_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'mlflow', 'numpy'}} & set(sys.modules)))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_arrive_on_first_use() -> None:
    import gsprune
    from gsprune.discovery.find import find_structures
    from gsprune.pruner.pruner import Pruner
    from gsprune.pruner.rule import Rule

    assert gsprune.Pruner is Pruner
    assert gsprune.Rule is Rule
    assert gsprune.find_structures is find_structures
    assert callable(gsprune.load_pruned)
    assert {*gsprune.__all__} <= {*dir(gsprune)}
    with pytest.raises(AttributeError, match="module 'gsprune' has no attribute 'Prunner'"):
        _ = gsprune.Prunner  # type: ignore[attr-defined]
