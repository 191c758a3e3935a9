"""The pictures of a pruner and of a cut hold what was scored, what goes, and what that saves."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from facts import refused
from PIL import Image
from torch import nn

import gsprune
from gsprune import Pruner
from gsprune.criteria import Abs, Elementwise
from gsprune.latency import Latency
from gsprune.plots import pruner_figures
from gsprune.plots.drawing import Picture, logarithmic, new_figure
from gsprune.schedules import OneShot

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def size(picture: Picture) -> tuple[int, int]:
    found = Image.open(io.BytesIO(picture._repr_png_()))
    assert np.asarray(found.convert("L")).std() > 5  # something is drawn
    return found.size


def bars(picture: Picture) -> dict[str, list[str]]:
    """The costs in the last panel, with their texts before and after."""
    axes = picture.figure.axes[2]
    texts = [text.get_text() for text in axes.texts]
    names = [label.get_text() for label in axes.get_yticklabels()]
    return {name: texts[2 * i : 2 * i + 2] for i, name in enumerate(names)}


def heights(picture: Picture) -> float:
    """How many scores the histogram counts: the last of the stacked series has the total."""
    return sum(patch.get_height() for patch in picture.figure.axes[0].patches)


def test_a_cut_shows_its_scores_layers_and_sizes(tmp_path):
    model = mlp()
    cut = gsprune.cut(model, [(X, Y)], nn.functional.cross_entropy, sparsity=0.5, progress=False)
    assert {name: scores.shape for name, scores in cut.scores.items()} == {"0": (16,), "2": (16,)}
    picture = cut.plot()
    width, height = size(picture)
    assert width > 1000 > height
    assert heights(picture) == 32
    labels = [label.get_text() for label in picture.figure.axes[1].get_yticklabels()]
    assert labels == ["0  50.0 %", "2  50.0 %"]
    found = bars(picture)
    assert found["parameters"] == ["452", f"{cut.small.params} ({100 * cut.small.params / 452:.1f} %)"]
    assert list(found) == ["parameters", "MACs"]
    picture.save(tmp_path / "cut.png")
    assert (tmp_path / "cut.png").read_bytes() == picture._repr_png_()


def test_a_cut_is_timed_only_with_both_networks_and_an_input():
    cut = gsprune.cut(mlp(), [(X, Y)], nn.functional.cross_entropy, sparsity=0.5, progress=False)
    with refused("dense", "example_input"):
        cut.plot(dense=mlp())


@pytest.mark.parametrize("criterion", [Abs(), Elementwise()])
def test_a_pruner_shows_what_will_go_and_then_what_is_left(criterion):
    model = mlp()
    pruner = Pruner(
        model, criterion, target_sparsity=0.5, scope="local", schedule=OneShot(start_epoch=1), example_input=X[:1]
    )
    with refused("no scores yet"):
        pruner.plot()
    nn.functional.cross_entropy(model(X), Y).backward()
    pruner.on_train_begin()
    pruner.on_epoch_begin(0)
    pruner.on_step_begin(0)
    pruner.on_before_optimizer_step()
    picture = pruner.plot(X[:1])
    total = pruner.share.total
    assert size(picture)[0] > 1000
    labels = [label.get_text() for label in picture.figure.axes[1].get_yticklabels()]
    assert [text.rpartition("  ")[2] for text in labels] == ["50.0 %"] * len(pruner.targets)
    assert heights(picture) + _zeros(picture) == total
    cost = "parameters" if pruner.structured else "parameters not zero"
    assert bars(picture)[cost][0] == "452"


def _zeros(picture: Picture) -> int:
    return sum(int(text.partition(" ")[0].replace(",", "")) for text in notes(picture, 0) if "score of 0" in text)


def notes(picture: Picture, panel: int) -> list[str]:
    """What stands below the title of a panel."""
    return picture.figure.axes[panel].get_title(loc="left").splitlines()[1:]


def test_what_was_pruned_before_has_no_score_and_is_counted():
    model = mlp()
    pruner = Pruner(
        model,
        Abs(),
        target_sparsity=0.5,
        scope="local",
        schedule=OneShot(),
        example_input=X[:1],
        epochs=1,
        steps_per_epoch=2,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner.attach(optimizer)
    for _ in range(2):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    picture = pruner.plot()
    assert notes(picture, 0) == ["16 pruned before, which have no score"]
    assert heights(picture) == 16
    legend = picture.figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["kept"]


def test_a_time_that_cannot_be_measured_says_why(monkeypatch):
    cut = gsprune.cut(mlp(), [(X, Y)], nn.functional.cross_entropy, sparsity=0.5, progress=False)
    monkeypatch.setattr(pruner_figures, "compare", lambda *_: Latency(note="not measurable here: too few repeats"))
    picture = cut.plot(dense=mlp(), example_input=X[:1])
    assert list(bars(picture)) == ["parameters", "MACs"]
    assert " ".join(notes(picture, 2)) == "milliseconds: not measurable here: too few repeats"


def test_labels_of_a_short_logarithmic_axis_stand_apart():
    axes = new_figure(4, 3).add_subplot()
    axes.plot([0.09, 0.45], [0, 1])
    logarithmic(axes)
    axes.figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    low, high = axes.get_xlim()
    assert [label.get_text() for label in labels if low <= label.get_position()[0] <= high] == ["0.1", "0.2"]


def test_a_control_has_nothing_to_draw():
    with refused("nothing to draw"):
        Pruner(mlp(), rules=[]).plot()


def test_a_scan_and_an_audit_draw_themselves():
    found = gsprune.sensitivity(mlp(), [(X, Y)], nn.functional.cross_entropy, shares=[0.5], progress=False)
    assert size(found.plot())[0] > 800
    batches = list(zip(X.split(8), Y.split(8), strict=True))
    audit = gsprune.audit(mlp(), batches, nn.functional.cross_entropy, units=8, progress=False)
    picture = audit.plot()
    assert size(picture)[0] > 800
    named = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert named == list(audit.scores)
