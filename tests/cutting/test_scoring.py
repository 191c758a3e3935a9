"""Gate gradients against the gradient of the weights, sample by sample, however a network and a loss are built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import nets
import pytest
import reference
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune.criteria import OBS, PLATON, Abs, Fisher, Magnitude, Random, Weighted
from gsprune.cutting import scoring
from gsprune.cutting.calibration import Calibration
from gsprune.cutting.scoring import branch_changes, gate_gradients, readers, unit_scores
from gsprune.discovery.branches import find_branches
from gsprune.discovery.find import find_structures
from gsprune.repair.least_squares import least_squares


class Encoder(nn.Module):
    """PyTorch's encoder: its attention does not call the output projection as a module."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.3)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class WritesOver(nn.Module):
    """Reads x, then changes it, in place or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.start, self.first = nn.Linear(6, 7), nn.Linear(7, 8)
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.tanh(self.start(x)))  # what `second` reads has a gradient already
        y = self.second(x)
        return self.third((x.mul_(2.0) if self.in_place else x * 2.0) + y)


class ReadsPast(nn.Module):
    """The same as a sequence of modules, whose last weight is read past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 8))
        self.add_module("2", nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.children()
        return F.linear(F.relu(first(x)), last.weight, last.bias)


class LastSampleLeaks(nn.Module):
    """Every sample sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + x.mean(0, keepdim=True))


def slow(model: nn.Module, structures, x: Tensor, y: Tensor, loss) -> dict[str, Tensor]:
    """One backward pass a sample, and the column sums of w * g."""
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rows: dict[str, list[Tensor]] = {s.name: [] for s in structures}
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        for s in structures:
            total = torch.zeros(s.units)
            for m in s.consumers:
                w = model.get_parameter(m.tensor)
                if w.grad is not None:
                    total += (w * w.grad).detach().transpose(0, 1).flatten(1).sum(1)[m.index].sum(1)
            rows[s.name].append(total)
    return {name: torch.stack(found) for name, found in rows.items()}


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


NETWORKS = {
    "mlp": (nets.mlp, (6,), 3),
    "residual": (nets.ResNet, (3, 8, 8), 4),
    "depthwise": (nets.Mobile, (3, 8, 8), 5),
    "concatenation": (nets.Dense, (3, 8, 8), None),
    "flatten": (nets.flat, (3, 8, 8), 3),
    "encoder": (Encoder, (5, 16), 3),
    "mixes samples": (LastSampleLeaks, (6,), 3),
}


@pytest.mark.parametrize("loss", [F.cross_entropy, sum_loss], ids=["mean", "sum"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_those_of_single_samples(name: str, loss) -> None:
    torch.manual_seed(0)
    build, shape, classes = NETWORKS[name]
    model = nets.settle(build())
    x = torch.randn(7, *shape)
    classes = classes or model.eval()(x).shape[1]
    y = torch.arange(7) % classes
    structures = find_structures(model, x[:2]).structures
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen network is scored too
    found = gate_gradients(model, structures, Calibration([(x[:4], y[:4]), (x[4:], y[4:])], loss))
    assert structures
    for key, rows in slow(model, structures, x, y, loss).items():
        torch.testing.assert_close(found[key], rows, rtol=1e-4, atol=1e-6)
        assert rows.abs().max() > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_inputs_that_are_changed_after_they_were_read() -> None:
    torch.manual_seed(0)
    model, x, y = WritesOver(in_place=False), torch.randn(5, 6), torch.arange(5) % 3
    structures, data = find_structures(model, x[:2]).structures, Calibration([(x, y)], F.cross_entropy)
    wanted = gate_gradients(model, structures, data)
    model.in_place = True
    for name, rows in gate_gradients(model, structures, data).items():
        torch.testing.assert_close(rows, wanted[name])


def test_a_weight_that_is_read_past_its_module() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6), torch.arange(5) % 3
    structures, data = find_structures(net, x[:2]).structures, Calibration([(x, y)], F.cross_entropy)
    model = ReadsPast()
    model.load_state_dict(net.state_dict())
    torch.testing.assert_close(gate_gradients(model, structures, data)["0"], gate_gradients(net, structures, data)["0"])


def test_scores_are_sums_over_single_samples() -> None:
    torch.manual_seed(0)
    model, x, y = nets.mlp(), torch.randn(9, 6), torch.arange(9) % 3
    structures = find_structures(model, x[:2]).structures
    singles = Calibration([(x[i : i + 1], y[i : i + 1]) for i in range(9)], F.cross_entropy)
    gates = gate_gradients(model, structures, singles)
    for criterion, wanted in (
        (Abs(decay=0.5), {k: g.abs().sum(0) for k, g in gates.items()}),
        (Fisher(), {k: g.square().sum(0) for k, g in gates.items()}),
    ):
        found = unit_scores(model, structures, criterion, singles)
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value)
            rule = criterion.of_gates(gates[key])
            assert rule is not None
            torch.testing.assert_close(rule * 9, value)
    assert Weighted().of_gates(gates["0"]) is None
    weights = unit_scores(model, structures, Magnitude(), singles)["0"]
    torch.testing.assert_close(weights, (model[0].weight.square().sum(1) + model[0].bias.square()).sqrt().detach())
    drawn = unit_scores(model, structures, Random(seed=1), singles)["0"]
    assert torch.equal(drawn, unit_scores(model, structures, Random(seed=1), singles)["0"])
    assert all(p.grad is None for p in model.parameters())


def test_a_second_average_keeps_its_decays() -> None:
    torch.manual_seed(0)
    model, x, y = nets.mlp(), torch.randn(9, 6), torch.arange(9) % 3
    structures = find_structures(model, x[:2]).structures
    singles = Calibration([(x[i : i + 1], y[i : i + 1]) for i in range(9)], F.cross_entropy)
    found = unit_scores(model, structures, PLATON(decay=0.7, spread_decay=0.9), singles)
    for name, gates in gate_gradients(model, structures, singles).items():
        steps = [*gates.abs()]
        torch.testing.assert_close(found[name], reference.accumulate(steps, 0.7).float())
        torch.testing.assert_close(found[f"{name}:spread"], reference.spread(steps, 0.7, 0.9).float())


def test_labels_drawn_from_predictions() -> None:
    torch.manual_seed(0)
    model = nets.mlp()
    data = Calibration([torch.randn(400, 6)])
    assert not data.labelled
    drawn = data.drawn_from(model)
    assert drawn.labelled
    odds = model(data.batches[0].inputs).softmax(1).mean(0)
    seen = torch.bincount(drawn.batches[0].targets, minlength=3) / 400
    torch.testing.assert_close(seen, odds.detach(), atol=0.06, rtol=0)
    again = data.drawn_from(model).batches[0].targets
    assert torch.equal(again, drawn.batches[0].targets)
    structures = find_structures(model, data.example_for(model)).structures
    assert gate_gradients(model, structures, drawn)["0"].shape == (400, 8)


def test_labels_of_tokens_are_drawn_one_by_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    drawn = Calibration([torch.randn(3, 4, 6)]).drawn_from(model)
    assert drawn.batches[0].targets.shape == (3, 4)
    loss = drawn.loss(model, drawn.batches[0])
    logits = model(drawn.batches[0].inputs)
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), drawn.batches[0].targets))


class OwnLoss(nn.Module):
    """As networks of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.mlp()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_network_with_a_loss_of_its_own() -> None:
    torch.manual_seed(0)
    model, x, y = OwnLoss(), torch.randn(8, 6), torch.arange(8) % 3
    own = Calibration([{"x": x, "labels": y}])
    own.check_loss()
    structures = find_structures(model, own.example_for(model)).structures
    given = Calibration([(x, y)], F.cross_entropy)
    inner = find_structures(model.net, x[:2]).structures
    mine, plain = gate_gradients(model, structures, own), gate_gradients(model.net, inner, given)
    torch.testing.assert_close(mine["net.0"], plain["0"])


# ---- gates as the outputs feel them


class Several(nn.Module):
    """Answers in some form, from the outputs of an MLP."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.answer = nets.mlp(), answer

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.answer(self.net(x))


def felt(model: nn.Module, data: Calibration) -> Tensor:
    found = data.of_outputs(model)
    assert found is not None
    structures = find_structures(model, data.example_for(model)).structures
    g_bu, *_ = gate_gradients(model, structures, found).values()
    return g_bu.square()


def slopes(model: nn.Module, x: Tensor) -> Tensor:
    """(u, c): of the logits of one sample to gates on the hidden units."""
    hidden = F.relu(model[0](x))
    return torch.func.jacrev(lambda gates: model[2:](hidden * gates)[0])(torch.ones(8)).T


def test_the_square_of_a_gate_gradient_is_that_of_all_outputs_on_average() -> None:
    torch.manual_seed(0)
    model, x = nets.mlp(), torch.randn(1, 6)
    mean = felt(model, Calibration([x.repeat(500, 1)] * 20, samples=10_000)).mean(0)
    torch.testing.assert_close(mean, slopes(model, x).square().sum(1), rtol=0.08, atol=1e-6)


def test_labels_and_the_loss_have_no_part_in_it() -> None:
    torch.manual_seed(0)
    model, x = nets.mlp(), torch.randn(9, 6)
    alone = felt(model, Calibration([x]))
    assert torch.equal(alone, felt(model, Calibration([(x, torch.zeros(9).long())], F.cross_entropy)))
    batches = felt(model, Calibration([x[:4], x[4:]]))  # a sample has the signs of its place
    torch.testing.assert_close(alone, batches)


def test_of_several_outputs_each_counts_by_its_own_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6)
    one, two = Several(lambda z: (z, 1000 * z)), Several(lambda z: (z, z))
    two.load_state_dict(one.state_dict())
    data = Calibration([x.repeat(2000, 1)], samples=2000)
    torch.testing.assert_close(felt(one, data), felt(two, data))
    logits = Several(lambda z: {"logits": z, "hidden": 1000 * z})
    logits.load_state_dict(one.state_dict())
    torch.testing.assert_close(felt(logits, data), felt(one.net, data))


def test_tokens_behind_the_mask_do_not_count() -> None:
    torch.manual_seed(0)
    model, x = Several(lambda z: z), torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    changed = torch.where(mask[:, :, None] == 1, x, torch.randn(3, 5, 6))
    found = [felt(model, Calibration([{"x": x, "attention_mask": mask}])) for x in (x, changed)]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], felt(model, Calibration([{"x": x, "attention_mask": torch.ones_like(mask)}])))


@pytest.mark.parametrize(
    "answer",
    [
        lambda z: z.sum(),
        lambda z: [{"boxes": z[0]}, {"boxes": z[0]}],
        lambda z: z.argmax(1),
        lambda z: z.mean(0, keepdim=True),
    ],
)
def test_outputs_without_a_number_a_sample_leave_it_to_the_loss(answer: Callable[[Tensor], Any]) -> None:
    assert Calibration([torch.randn(3, 6)]).of_outputs(Several(answer)) is None


def without_branch(model: nn.Module, layer: str, x: Tensor, following: Sequence[str] = ()) -> nn.Module:
    """With that layer at zero, and what following ones add refitted to what the stream then lacks."""
    network = copy.deepcopy(model)
    for parameter in network.get_submodule(layer).parameters():
        nn.init.zeros_(parameter)
    if following:
        least_squares(network, model, [x], layers=following)
    return network


def test_a_branch_of_one_sample_is_scored_by_what_the_outputs_change_without_it() -> None:
    torch.manual_seed(0)
    model, x = nets.ViT().eval(), nets.images(1)
    before = copy.deepcopy(model.state_dict())
    data = Calibration([x]).of_outputs(model)
    assert data is not None
    scores = branch_changes(model, find_branches(model, x).structures, data)
    for name, layer in (("blocks.0.attn", "blocks.0.attn.proj"), ("blocks.1.fc2", "blocks.1.fc2")):
        without = without_branch(model, layer, x)
        torch.testing.assert_close(scores[name], (model(x) - without(x)).square().sum(1).mean().reshape(1))
    assert len({float(score) for score in scores.values()}) == len(scores) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_branch_is_scored_after_a_refit_on_samples_that_it_did_not_see() -> None:
    torch.manual_seed(0)
    model, x = nets.ViT().eval(), nets.images(60)
    before = copy.deepcopy(model.state_dict())
    data = Calibration([x[:40], x[40:]]).of_outputs(model)
    assert data is not None
    scores = branch_changes(model, find_branches(model, x).structures, data)
    lasts = ["blocks.0.attn.proj", "blocks.0.fc2", "blocks.1.attn.proj", "blocks.1.fc2"]
    for number, (name, layer) in enumerate(zip(scores, lasts, strict=True)):
        others = {n for n, m in model.named_modules() if not any(True for _ in m.children())} - {layer}
        following = lasts[number + 1 : number + 3] or sorted(others)
        raw, refitted = without_branch(model, layer, x), without_branch(model, layer, x[:30], following)
        change, left = ((model(x[30:]) - network(x[30:])).square().sum(1).mean() for network in (raw, refitted))
        torch.testing.assert_close(scores[name], left.reshape(1), rtol=1e-3, atol=0.0)
        assert left < change
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_projections_of_pytorchs_attentions_are_refitted_for_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True), 2
    ).eval()
    data = Calibration([torch.randn(40, 5, 8)]).of_outputs(model)
    assert data is not None
    refitted: list[str] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        report = least_squares(*args, **kwargs)
        refitted.extend(layer.name for layer in report.repaired)
        return report

    monkeypatch.setattr(scoring, "least_squares", noting)
    branch_changes(model, find_branches(model, torch.randn(2, 5, 8)).structures, data)
    assert "layers.1.self_attn.out_proj" in refitted
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)


class Outer(nn.Module):
    """A branch with a branch inside, whose layers come behind it in the order of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inner = nn.Linear(6, 6), nets.Feedforward(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(x))


def test_a_branch_that_goes_with_another_is_not_refitted_for_it() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 6), Outer(), nets.Feedforward(6, 8), nn.Linear(6, 3)).eval(),
        torch.randn(40, 4),
    )
    data, structures = Calibration([x]).of_outputs(model), find_branches(model, x[:2]).structures
    assert data is not None
    assert any("1.inner" in path for s in structures if s.masked[0].tensor.startswith("1.down") for path in s.removed)
    assert branch_changes(model, structures, data).keys() == {s.name for s in structures}


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    model, x = nets.mlp(), torch.full((2, 6), float("inf"))
    structures = find_structures(model, torch.zeros(1, 6)).structures
    with refused("not finite"):
        gate_gradients(model, structures, Calibration([(x, torch.zeros(2).long())], F.cross_entropy))


def test_a_wide_layer_behind_a_flattening_reads_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns are positions of channels: moments are of the channels, and not of all columns."""
    torch.manual_seed(0)
    model, x = nets.flat(), torch.randn(30, 3, 8, 8)
    structures = find_structures(model, x[:2]).structures
    (whole,) = readers(model, structures, Calibration([x]))["0"]
    assert (whole.gram.shape, whole.columns.shape) == ((256, 256), (4, 64))
    monkeypatch.setattr(scoring, "NARROW", 100)
    (folded,) = readers(model, structures, Calibration([x]))["0"]
    assert (folded.gram.shape, folded.weight.shape, folded.columns.shape) == ((4, 4), (3 * 64, 4), (4, 1))
    rows = model[:3](x).flatten(2).movedim(1, 2).reshape(-1, 4).detach().double()
    rows = rows - rows.mean(0)
    torch.testing.assert_close(folded.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-8)
    assert folded.weight.square().sum() == pytest.approx(float(model[4].weight.square().sum()), rel=1e-6)
    assert OBS().of_readers([folded], torch.rand(5, 4)).isfinite().all()
    monkeypatch.setattr(scoring, "WIDE", 3)
    assert readers(model, structures, Calibration([x]))["0"] == []


def test_outputs_in_a_mapping_without_logits_are_no_classes() -> None:
    with refused("cannot be drawn", "dict"):
        Calibration([torch.randn(3, 6)]).drawn_from(Several(lambda z: {"boxes": z}))
