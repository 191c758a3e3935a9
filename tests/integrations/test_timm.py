"""timm's own files of a pruned network, read by timm where its arguments can say what is left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import refused
from torch import nn

from gsprune import Pruner
from gsprune.criteria import Magnitude
from gsprune.schedules import OneShot

timm = pytest.importorskip("timm")
PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**sizes, **settings})
    return made.eval()


def cut(model: nn.Module, **settings: Any) -> Pruner:
    given = {"target_sparsity": 0.5, "schedule": OneShot(), "example_input": PICTURES, **settings}
    pruner = Pruner(model, Magnitude(), structured=True, **given)
    pruner.on_step_begin(0)
    pruner.on_train_end()
    return pruner


def test_timm_alone_reads_what_its_arguments_can_say(tmp_path: Path) -> None:
    from gsprune.integrations.timm import from_pretrained, save_pretrained

    model = vit()
    pruner = cut(model, kinds=["neurons"], scope="local")
    assert save_pretrained(tmp_path, model, pruner.plan, example_input=PICTURES)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["mlp_ratio"] == 2.0
    with torch.no_grad():
        torch.save((PICTURES, model(PICTURES)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['gsprune'] = None; import timm\n"
        f"x, wanted = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"net = timm.create_model('local-dir:{tmp_path}', pretrained=True).eval()\n"
        "assert torch.allclose(net(x), wanted, atol=1e-6); print(net.blocks[1].mlp.fc1.out_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "48\n", done.stderr
    again = from_pretrained(tmp_path)
    assert torch.allclose(again(PICTURES), model(PICTURES), atol=1e-6)


@pytest.mark.parametrize("kinds", [["heads"], ["neurons"]])
def test_what_they_cannot_say_is_read_with_gsprune(kinds: list[str], tmp_path: Path) -> None:
    """timm has no argument for the width of fewer heads, nor for blocks of different widths."""
    from gsprune.integrations.timm import from_pretrained, save_pretrained

    model = vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)  # type: ignore[index,union-attr]
    pruner = cut(model, kinds=kinds, scope="local" if kinds == ["heads"] else "global", target_sparsity=0.4)
    assert not save_pretrained(tmp_path, model, pruner.plan, example_input=PICTURES)
    again = from_pretrained(tmp_path)
    assert torch.equal(again(PICTURES), model(PICTURES))
    with pytest.raises(RuntimeError, match="size mismatch"):  # not in silence
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_network_that_was_not_cut_is_timms_own(tmp_path: Path) -> None:
    from gsprune.integrations.timm import from_pretrained, save_pretrained

    model = timm.create_model("resnet10t", num_classes=3).eval()
    assert save_pretrained(tmp_path, model, None, example_input=PICTURES)
    assert torch.allclose(from_pretrained(tmp_path)(PICTURES), model(PICTURES), atol=1e-6)


def test_what_is_no_network_or_folder_of_timm_is_refused(tmp_path: Path) -> None:
    from gsprune.integrations.timm import from_pretrained, save_pretrained

    with refused("Linear", "timm.create_model", "gsprune.save_pruned"):
        save_pretrained(tmp_path, nn.Linear(2, 2), None, example_input=torch.ones(1, 2))
    with refused(str(tmp_path), "config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "no_such_network"}')
    with refused("no_such_network", "timm"):
        from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with refused("config.json"):
        from_pretrained(tmp_path)
