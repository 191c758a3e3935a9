"""The loss of distillation has the values of its formula; the loop recovers a cut network and keeps masks."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from facts import refused, warned
from torch import nn
from torch.testing import assert_close

from gsprune import Pruner
from gsprune.repair.distill import distill, distillation_loss, divergence


def slow_divergence(student, teacher, temperature):
    """T^2 * sum p log(p / q), one row after the other."""
    found = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (t, s))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        found.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return torch.tensor(found, dtype=torch.float64)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
def test_the_divergence_is_that_of_the_formula(temperature):
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    expected = slow_divergence(student, teacher, temperature)
    assert_close(divergence(student, teacher, temperature=temperature), expected)
    found = distillation_loss(student, teacher, torch.tensor(3.0).double(), weight=0.25, temperature=temperature)
    assert_close(found, 0.75 * 3.0 + 0.25 * expected.mean())


def test_classes_may_be_any_dimension_and_half_precision_is_computed_in_float32():
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    rows = divergence(student, teacher)
    pictures = [x.t().reshape(1, 4, 5, 1) for x in (student, teacher)]
    assert_close(divergence(*pictures), rows.reshape(1, 5, 1))
    task = torch.zeros((), dtype=torch.float64)
    assert_close(distillation_loss(*(x[None] for x in (student, teacher)), task, weight=1.0, dim=-1), rows.mean())
    half = divergence(student.bfloat16(), teacher.bfloat16())
    assert half.dtype is torch.float32
    assert_close(half, slow_divergence(student.bfloat16(), teacher.bfloat16(), 2.0).float())


def test_only_the_student_gets_a_gradient_and_none_where_it_agrees():
    student, teacher = logits(5, 4).requires_grad_(), logits(5, 4, seed=1).requires_grad_()
    divergence(student, teacher).sum().backward()
    p, q = (torch.softmax(x.detach() / 2, 1) for x in (teacher, student))
    assert teacher.grad is None
    assert_close(student.grad, 2 * (q - p))  # T * (softmax(student / T) - softmax(teacher / T))
    assert_close(divergence(teacher, teacher), torch.zeros(5).double())


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"weight": 1.5}, ("weight", 1.5, "0 to 1")),
        ({"temperature": 0.0}, ("temperature", 0.0, "above 0")),
        ({"teacher_logits": torch.zeros(5, 3)}, ("[5, 4]", "[5, 3]")),
        ({"student_logits": torch.zeros(5, 1), "teacher_logits": torch.zeros(5, 1)}, ("[5, 1]", "two classes")),
        ({"student_logits": torch.zeros(5, 4, 2), "teacher_logits": torch.zeros(5, 4, 2)}, ("[5, 4, 2]", "dim")),
    ],
)
def test_what_makes_no_sense_is_refused(change, facts):
    given = {"student_logits": torch.zeros(5, 4), "teacher_logits": torch.zeros(5, 4), "task_loss": torch.zeros(())}
    with refused(*facts):
        distillation_loss(**{**given, **change})


# --- the loop ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.b(self.drop(self.norm(self.a(x)).relu()))


@pytest.fixture
def task():
    """A dense network that knows its task, batches of it, and a small network that does not."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 6)
    targets = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
    batches = list(zip(inputs.split(32), targets.split(32), strict=True))
    dense = Net()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.01)
    for x, y in batches * 4:
        F.cross_entropy(dense(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(dense=dense, batches=batches, small=Net(6), x=inputs, y=targets)


def accuracy(model, task):
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(task.x).argmax(1) == task.y).float().mean())


def test_a_small_network_learns_and_the_teacher_stays_as_it_was(task):
    before, drawn = copy.deepcopy(task.dense.state_dict()), accuracy(task.small, task)
    task.small.norm.eval()
    rows = distill(task.small, task.dense, task.batches, F.cross_entropy, epochs=3, lr=0.02)
    assert [set(row) for row in rows] == [{"loss", "distill_loss"}] * 3
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["distill_loss"] < 0.7 * rows[0]["distill_loss"]
    assert accuracy(task.small, task) > max(0.8, drawn)
    assert all(torch.equal(value, before[name]) for name, value in task.dense.state_dict().items())
    assert (task.small.training, task.small.norm.training, task.dense.training) == (True, False, True)
    assert all(parameter.grad is None for parameter in task.small.parameters())


def test_one_step_is_that_of_the_formula(task):
    small = copy.deepcopy(task.small)
    optimizer = torch.optim.SGD(task.small.parameters(), lr=0.5)
    torch.manual_seed(5)
    distill(
        *(task.small, task.dense, task.batches[:1], F.cross_entropy),
        **{"epochs": 1, "weight": 0.25, "temperature": 3.0, "optimizer": optimizer},
    )
    torch.manual_seed(5)
    (x, y), teacher = task.batches[0], copy.deepcopy(task.dense).eval()
    out = small(x)
    distillation_loss(out, teacher(x), F.cross_entropy(out, y), weight=0.25, temperature=3.0).backward()
    for parameter, stepped in zip(small.parameters(), task.small.parameters(), strict=True):
        assert_close(parameter.detach() - 0.5 * parameter.grad, stepped.detach())


def test_masks_of_a_pruner_stay_and_zeros_without_one_are_told(task):
    mask = torch.rand(task.small.a.weight.shape) > 0.5
    pruner = Pruner.from_masks(task.small, {"a.weight": mask})
    distill(task.small, task.dense, task.batches, F.cross_entropy, epochs=1, pruner=pruner)
    assert torch.equal(task.small.a.weight != 0, mask)
    with warned("a.weight", "from_masks"):
        distill(task.small, task.dense, task.batches, F.cross_entropy, epochs=1)
    assert int((task.small.a.weight != 0).sum()) == mask.numel()


class Texts(nn.Module):
    """Like a network of transformers: named inputs, its own loss, logits of every token."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, ids, attention_mask, labels=None):
        out = self.head(self.table(ids))
        return {"loss": None if labels is None else F.cross_entropy(out.flatten(0, 1), labels.flatten()), "logits": out}


def test_networks_with_their_own_loss_are_compared_at_every_token_but_padding():
    torch.manual_seed(0)
    small, dense, ids = Texts(), Texts(), torch.randint(9, (4, 5))
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    labels = torch.where(mask.bool(), torch.zeros_like(ids), -100)
    batch = {"ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        before, wanted = small(**batch), dense(**batch)["logits"]
    expected = divergence(before["logits"], wanted, dim=-1)[:, :3].mean()
    (row,) = distill(small, dense, [batch], epochs=1, dim=-1, optimizer=torch.optim.SGD(small.parameters(), lr=1.0))
    assert_close(row["distill_loss"], float(expected))
    assert_close(row["loss"], float(before["loss"]))
    with refused("[4, 5, 3]", "dim"):
        distill(small, dense, [batch], epochs=1)
    with refused("no loss", "labels"):
        distill(small, dense, [{"ids": ids, "attention_mask": mask}], epochs=1, dim=-1)


def test_a_loss_that_is_not_finite_is_an_error_and_the_weights_are_those_of_before(task):
    before = copy.deepcopy(task.small.state_dict())
    optimizer = torch.optim.SGD(task.small.parameters(), lr=1e30)
    with refused("loss", "nan", "lr"):
        distill(task.small, task.dense, task.batches, F.cross_entropy, epochs=2, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in task.small.state_dict().items())
    assert task.small.training


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"epochs": 0}, ("epochs", 0)),
        ({"lr": -1.0}, ("lr", -1.0)),
        ({"weight": 2}, ("weight", 2)),
        ({"batches": []}, ("no batch",)),
        ({"batches": iter([])}, ("list_iterator", "2 epochs")),
        ({"loss": lambda out, y: F.cross_entropy(out, y, reduction="none")}, ("scalar",)),
        ({"dense": nn.Linear(6, 5)}, ("[32, 4]", "[32, 5]")),
    ],
)
def test_wrong_settings_of_the_loop_are_refused(task, settings, facts):
    given = {"small": task.small, "dense": task.dense, "batches": task.batches, "loss": F.cross_entropy}
    with refused(*facts):
        distill(**{**given, **settings})


def test_a_network_is_no_teacher_of_itself_and_a_frozen_one_no_student(task):
    with refused("same network"):
        distill(task.dense, task.dense, task.batches, F.cross_entropy)
    with refused("requires_grad"):
        distill(task.small.requires_grad_(False), task.dense, task.batches, F.cross_entropy)
