"""Networks of one's own in the form of the Hugging Face Hub: a folder stands for a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import nn

import gsprune
from gsprune.criteria import Magnitude

pytest.importorskip("huggingface_hub")
from gsprune.integrations.hub import PrunedHubMixin, Pruning

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module, PrunedHubMixin, tags=["mine"]):
    def __init__(self, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def pruned(**settings: Any) -> Net:
    cut = gsprune.cut(Net(width=6, depth=2), [X], criterion=Magnitude(), sparsity=0.5, progress=False, **settings)
    cut.model.pruning = Pruning(
        cut.plan, {"accuracy": (0.95, 0.9), "MACs": (108, 40)}, "python prune.py\n--sparsity 0.5"
    )
    return cut.model  # type: ignore[return-value]


def test_a_cut_network_comes_back_with_its_arguments_and_its_card(tmp_path: Path) -> None:
    net = pruned()
    net.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "pruning.json"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"width": 6, "depth": 2}
    again = Net.from_pretrained(tmp_path)
    assert torch.equal(again(X), net(X))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in Net(6, 2).parameters())
    assert again.pruning is not None
    assert again.pruning.numbers == {"accuracy": (0.95, 0.9), "MACs": (108.0, 40.0)}
    card = (tmp_path / "README.md").read_text()
    dense = sum(p.numel() for p in Net(6, 2).parameters())
    now = sum(p.numel() for p in net.parameters())
    rows = ["- mine", f"| parameters | {dense:,} | {now:,} |", "| accuracy | 0.95 | 0.9 |", "    --sparsity 0.5"]
    rows += ["- `layers.0.weight`, dimension 0: 3 of 6 stay", "`Net.from_pretrained` loads it, and needs gsprune."]
    assert set(rows) <= set(card.splitlines())


def test_it_is_saved_again_after_loading(tmp_path: Path) -> None:
    net = pruned()
    net.save_pretrained(tmp_path / "one")
    Net.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert torch.equal(Net.from_pretrained(tmp_path / "two")(X), net(X))
    assert (tmp_path / "one" / "README.md").read_text() == (tmp_path / "two" / "README.md").read_text()


def test_without_pruning_it_is_the_mixin_of_the_hub(tmp_path: Path) -> None:
    net = Net(width=5)
    net.save_pretrained(tmp_path)
    assert not (tmp_path / "pruning.json").exists()
    assert torch.equal(Net.from_pretrained(tmp_path)(X), net(X))
    assert "## Pruning" not in (tmp_path / "README.md").read_text()


def test_a_repository_is_fetched_and_pushed_as_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client is replaced by a folder: what is sent is what `from_pretrained` reads."""
    import huggingface_hub
    from huggingface_hub import hub_mixin

    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, folder_path: Any, repo_id: str, **_: Any) -> str:
            sent[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return "sent"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    net = pruned()
    net.push_to_hub("me/net")
    (tmp_path / "cache").mkdir()
    for name, content in sent["me/net"].items():
        (tmp_path / "cache" / name).write_bytes(content)
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: asked.append((name, given)) or tmp_path / "cache"
    )
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda **_: str(tmp_path / "cache" / "config.json"))
    again = Net.from_pretrained("me/net", revision="main")
    assert torch.equal(again(X), net(X))
    ((name, given),) = asked
    assert (name, given["revision"]) == ("me/net", "main")
    assert given["allow_patterns"] == ["pruning.json", "model.safetensors"]


def test_files_of_another_class_are_refused(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 7, "depth": 2}')
    with refused("layers.0.weight", "7"):
        Net.from_pretrained(tmp_path)
