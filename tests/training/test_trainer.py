"""The training loop: order of the hooks, exact accumulation, exact averages, schedules, repeatability."""

from __future__ import annotations

import copy
import math
from collections import UserDict, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from facts import refused
from torch import Tensor, nn

from gsprune import Pruner
from gsprune.criteria import Elementwise
from gsprune.repair.distill import divergence
from gsprune.training.guard import parameters_of
from gsprune.training.optimization import constant, make_optimizer, warmup_cosine
from gsprune.training.trainer import Totals, Trainer, find_device, seed_everything


class Recorder:
    """A pruner that prunes nothing and writes down what it was told, and the gradients it was shown."""

    def __init__(self, model: nn.Module | None = None):
        self.calls: list[str] = []
        self.model = model
        self.gradients: list[Tensor] = []

    def on_train_begin(self):
        self.calls.append("train_begin")

    def on_epoch_begin(self, epoch):
        self.calls.append(f"epoch_begin {epoch}")

    def on_step_begin(self, step):
        self.calls.append(f"step_begin {step}")

    def on_before_optimizer_step(self):
        self.calls.append("before_optimizer_step")
        if self.model is not None:
            self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))

    def on_step_end(self):
        self.calls.append("step_end")

    def on_epoch_end(self):
        self.calls.append("epoch_end")

    def on_train_end(self):
        self.calls.append("train_end")


def batches(*sizes, features=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, features, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def joined(group):
    return torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(trainer, model, loader, *, pruner=None, epochs=1, lr=0.1, val=None, optimizer=None, **callbacks):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    schedule = constant(optimizer, total_steps=epochs * trainer.steps_per_epoch(loader))
    trainer.fit(
        model,
        loader,
        val,
        optimizer=optimizer,
        lr_schedule=schedule,
        pruner=pruner or Recorder(),
        epochs=epochs,
        **callbacks,
    )


CPU = partial(Trainer, device="cpu")


# --- order -------------------------------------------------------------------------------------------------


def test_hook_order_with_accumulation_and_a_short_last_group():
    pruner = Recorder()
    fit(CPU(accumulate_steps=2), mlp(), batches(4, 4, 4), pruner=pruner, epochs=2)
    step = ["before_optimizer_step", "step_end"]
    epoch = ["step_begin 0", *step, "step_begin 1", *step, "epoch_end"]
    assert pruner.calls == ["train_begin", "epoch_begin 0", *epoch, "epoch_begin 1", *epoch, "train_end"]


def test_every_event_around_the_optimizer_step_happens_in_the_promised_order(monkeypatch):
    events: list[str] = []
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Recorder()
    pruner.calls = events
    model.register_forward_hook(lambda *_: events.append("forward"))
    optimizer.register_step_post_hook(lambda *_: events.append("optimizer.step"))
    zero_grad = optimizer.zero_grad

    def recorded_zero_grad(set_to_none):
        assert set_to_none is True
        events.append("zero_grad")
        zero_grad(set_to_none)

    monkeypatch.setattr(optimizer, "zero_grad", recorded_zero_grad)
    clip = nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", lambda *a: (events.append("clip"), clip(*a))[1])
    fit(
        CPU(accumulate_steps=2, clip_norm=1.0),
        model,
        batches(4, 4),
        pruner=pruner,
        optimizer=optimizer,
        on_step=lambda totals: events.append("on_step"),
        on_epoch=lambda epoch, values: events.append("on_epoch"),
    )
    assert events == [
        "train_begin",
        "epoch_begin 0",
        "step_begin 0",
        "forward",
        "forward",
        "before_optimizer_step",
        "clip",
        "optimizer.step",
        "step_end",
        "zero_grad",
        "on_step",
        "epoch_end",
        "on_epoch",
        "train_end",
    ]


def test_the_mode_of_the_model_is_train_in_the_steps_and_eval_in_the_validation():
    model, seen = mlp(), []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.eval()
    fit(CPU(), model, batches(4, 4), val=batches(2), epochs=2)
    assert seen == [True, True, False, True, True, False]


# --- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 4, 4, 1)], ids=["even", "short last batch"])
def test_accumulating_four_batches_equals_one_batch_of_all_their_samples(sizes):
    group = batches(*sizes)
    model, whole = mlp().double(), mlp().double()
    pruner, expected = Recorder(model), Recorder(whole)
    as_double = [(x.double(), y) for x, y in group]
    fit(CPU(accumulate_steps=4), model, as_double, pruner=pruner)
    fit(CPU(), whole, [joined(as_double)], pruner=expected)
    torch.testing.assert_close(pruner.gradients, expected.gradients, rtol=0, atol=1e-6)
    torch.testing.assert_close(parameters_of_model(model), parameters_of_model(whole), rtol=0, atol=1e-6)


def parameters_of_model(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_short_last_group_is_the_mean_over_its_own_samples():
    data = batches(4, 4, 4, 4, 4, 2)
    model, whole = mlp(), mlp()
    pruner, expected = Recorder(model), Recorder(whole)
    fit(CPU(accumulate_steps=4), model, data, pruner=pruner)
    fit(CPU(), whole, [joined(data[:4]), joined(data[4:])], pruner=expected)
    assert len(pruner.gradients) == 2
    torch.testing.assert_close(pruner.gradients, expected.gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1)])
def test_with_a_teacher_the_gradient_is_that_of_the_mixed_loss_over_the_group(sizes):
    data, model, rows = batches(*sizes), mlp(), []
    teacher = nn.Sequential(mlp(1), nn.BatchNorm1d(3), nn.Dropout(0.5))
    teacher[1].running_mean.fill_(0.5)
    before = copy.deepcopy(teacher.state_dict())
    pruner, plain = Recorder(model), mlp()
    torch.manual_seed(9)
    settings = {"accumulate_steps": 2, "distill": 0.3, "distill_temperature": 3.0}
    fit(CPU(**settings), model, data, pruner=pruner, teacher=teacher, on_epoch=lambda _, values: rows.append(values))
    drawn = torch.rand(())
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(()))  # the teacher, with its dropout, has drawn nothing
    x, y = joined(data)
    out, wanted = plain(x), copy.deepcopy(teacher).eval()(x)
    task, distance = F.cross_entropy(out, y), divergence(out, wanted, temperature=3.0).mean()
    (0.7 * task + 0.3 * distance).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(pruner.gradients, [expected], rtol=0, atol=1e-6)
    assert rows[0]["train/loss"] == pytest.approx(task.item())  # of the task alone
    assert rows[0]["train/distill_loss"] == pytest.approx(distance.item(), rel=1e-4)
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_without_a_weight_is_refused():
    with refused("trainer.distill", "0.0", "teacher"):
        fit(CPU(), mlp(), batches(4), teacher=mlp(1))


def test_the_pruner_sees_the_gradient_before_clipping_and_the_optimizer_after():
    data = batches(8)
    model = mlp()
    pruner = Recorder(model)
    before = parameters_of_model(model)
    fit(CPU(clip_norm=1e-3), model, data, pruner=pruner, lr=1.0)
    plain = mlp()
    F.cross_entropy(plain(data[0][0]), data[0][1]).backward()
    unclipped = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(pruner.gradients[0], unclipped)
    assert (before - parameters_of_model(model)).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_shows_unscaled_float32_gradients_close_to_the_full_ones(precision):
    data = batches(64)
    model, full = mlp(), mlp()
    pruner, expected = Recorder(model), Recorder(full)
    fit(CPU(precision=precision), model, data, pruner=pruner)
    fit(CPU(), full, data, pruner=expected)
    assert pruner.gradients[0].dtype == torch.float32
    torch.testing.assert_close(pruner.gradients[0], expected.gradients[0], rtol=0.1, atol=0.01)
    assert not torch.equal(pruner.gradients[0], expected.gradients[0])


def test_fp16_skips_a_step_whose_gradient_is_not_finite(recwarn):
    (inputs, labels), good = batches(4, 4)
    model = mlp()
    start = parameters_of_model(model)
    seen = []
    inputs[0, 0] = float("inf")
    fit(
        CPU(precision="fp16"),
        model,
        [(inputs, labels), good],
        on_step=lambda totals: seen.append(parameters_of_model(model)),
    )
    assert torch.equal(seen[0], start)
    assert not torch.equal(seen[1], start)
    assert torch.isfinite(seen[1]).all()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


# --- scoring -----------------------------------------------------------------------------------------------


class Noted(Recorder):
    """Also notes the mode of the model."""

    def on_before_optimizer_step(self):
        super().on_before_optimizer_step()
        self.calls[-1] += f" training={self.model.training}"


def net_with_buffers():
    """BatchNorm's statistics, one BatchNorm that is frozen, and buffers that the forward pass replaces and makes."""

    class Counted(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("seen", torch.zeros(1), persistent=False)
            self.register_buffer("last", None)

        def forward(self, x):
            self.seen, self.last = self.seen + len(x), x.detach()
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Counted(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model(torch.randn(6, 5))
    model[0].last = None
    model[3].eval()
    return model


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_scores_of_a_pass_are_the_slow_sum_over_its_groups(decay):
    data = batches(4, 4, 4, 2)
    model = mlp()
    pruner = Pruner(model, Elementwise(decay=decay), target_sparsity=0.5, epochs=3)
    trainer = CPU(accumulate_steps=2, clip_norm=1e-3)
    assert trainer.score(model, data, optimizer=torch.optim.SGD(model.parameters()), pruner=pruner) == 2
    changes = []
    for group in (data[:2], data[2:]):
        plain = mlp().double()
        inputs, labels = joined(group)
        F.cross_entropy(plain(inputs.double()), labels).backward()
        changes.append((plain[0].weight * plain[0].weight.grad).abs().detach())
    expected = reference.accumulate(changes, decay).float()
    torch.testing.assert_close(pruner.scores()["0.weight"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_scoring_pass_leaves_the_network_bit_for_bit_as_it_was(precision):
    model = net_with_buffers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(CPU(), model, batches(4, 4), optimizer=optimizer)
    model(batches(4)[0][0]).sum().backward()  # gradients that somebody left: not of this pass
    model[0].last = None
    model[3].eval()
    state = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    places = [b.data_ptr() for b in model.buffers()]
    memory = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    pruner = Noted(model)
    assert CPU(precision=precision).score(model, batches(4, 4), optimizer=optimizer, pruner=pruner) == 2
    assert pruner.calls == ["before_optimizer_step training=True"] * 2
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(after) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in after.items())
    assert [b.data_ptr() for b in model.buffers()] == places
    assert [part.training for part in model] == [True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    kept = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, memory, strict=True))


def test_a_scoring_pass_shows_the_gradients_that_training_without_a_learning_rate_shows():
    data = batches(4, 4, 3)
    model, trained = net_with_buffers(), net_with_buffers()
    pruner, expected = Recorder(model), Recorder(trained)
    model(data[0][0]).sum().backward()
    CPU().score(model, data, optimizer=torch.optim.SGD(model.parameters()), pruner=pruner)
    fit(CPU(), trained, data, pruner=expected, lr=0.0)
    torch.testing.assert_close(pruner.gradients, expected.gradients, rtol=0, atol=0)


@pytest.mark.parametrize(("steps", "done"), [(None, 3), (0, 0), (2, 2), (3, 3), (99, 3)])
def test_a_scoring_pass_stops_after_its_steps_or_with_the_loader(steps, done):
    class Counted(list):
        taken = 0

        def __iter__(self):
            for batch in super().__iter__():
                self.taken += 1
                yield batch

    model, data, pruner = mlp(), Counted(batches(4, 4, 4, 4, 4)), Recorder()
    optimizer = torch.optim.SGD(model.parameters())
    assert CPU(accumulate_steps=2).score(model, data, optimizer=optimizer, pruner=pruner, steps=steps) == done
    assert pruner.calls == ["before_optimizer_step"] * done
    assert data.taken == min(2 * done, 5)


def test_a_scale_too_large_for_fp16_shrinks_during_the_pass(monkeypatch):
    make = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, **kw: make(*a, **kw, init_scale=2.0**40, backoff_factor=2.0**-30)
    )
    model = mlp()
    pruner = Pruner(model, Elementwise(), target_sparsity=0.5, epochs=3)
    optimizer = torch.optim.SGD(model.parameters())
    assert CPU(precision="fp16").score(model, batches(4, 4, 4), optimizer=optimizer, pruner=pruner) == 3
    assert pruner.state_dict()["rules"][0]["scored"] == 2
    assert 0 < float(pruner.scores()["0.weight"].max()) < 10


def test_a_scoring_pass_that_fails_also_leaves_the_network_as_it_was():
    model = net_with_buffers()
    before = {name: value.clone() for name, value in model.named_buffers()}
    wrong = [*batches(4), (torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        CPU().score(model, wrong, optimizer=torch.optim.SGD(model.parameters()), pruner=Recorder())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model[0].last is None
    assert [part.training for part in model] == [True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters())
    with refused("steps=-1", "0 or more", "None"):
        CPU().score(model, wrong, optimizer=torch.optim.SGD(model.parameters()), pruner=Recorder(), steps=-1)


# --- averages ----------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits are the inputs, plus a parameter that is zero."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x + self.bias


def test_averages_are_over_samples_with_an_uneven_last_batch():
    right, wrong = math.log1p(math.exp(-2.0)), math.log1p(math.exp(2.0))  # losses of a margin of 2
    first = (torch.tensor([[2.0, 0.0]] * 3), torch.tensor([0, 0, 1]))
    last = (torch.tensor([[0.0, 2.0]]), torch.tensor([0]))
    expected = {"loss": (2 * right + 2 * wrong) / 4, "accuracy": 0.5}  # of batch means: accuracy 1/3
    assert CPU().evaluate(Fixed(), [first, last]) == pytest.approx(expected, rel=1e-6)


def test_epoch_values_are_named_and_averaged_over_the_epoch():
    values = []
    data = batches(4, 4, 2)
    model = mlp()
    fit(
        CPU(),
        model,
        data,
        val=data,
        epochs=2,
        lr=1e-12,
        on_epoch=lambda epoch, found: values.append((epoch, found)),
    )
    assert [epoch for epoch, _ in values] == [0, 1]
    first = values[0][1]
    names = ["train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr", "epoch_seconds"]
    assert list(first) == names
    inputs, labels = joined(data)
    assert first["train/loss"] == pytest.approx(F.cross_entropy(model(inputs), labels).item(), rel=1e-6)
    assert first["train/accuracy"] == pytest.approx((model(inputs).argmax(1) == labels).float().mean().item())
    assert (first["val/loss"], first["val/accuracy"]) == pytest.approx(
        (first["train/loss"], first["train/accuracy"]), rel=1e-6
    )
    assert first["lr"] == 1e-12


def test_running_totals_can_be_read_in_the_middle_of_an_epoch():
    seen = []
    data = [(torch.tensor([[1.0, 0.0]]), torch.tensor([label])) for label in (0, 1, 1, 1)]
    fit(CPU(), Fixed(), data, lr=1e-9, on_step=lambda totals: seen.append(totals.read()["accuracy"]))
    assert seen == [1.0, 1 / 2, 1 / 3, 1 / 4]


def test_an_empty_loader_is_an_error():
    with refused("loader", "no batch"):
        CPU().evaluate(mlp(), [])


def test_evaluation_changes_neither_batchnorm_nor_modes_nor_gradients():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()  # a frozen BatchNorm in a model that trains
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CPU().evaluate(model, batches(4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_totals_wait_for_nothing_until_they_are_read():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync inside a step"
            return func(*args, **(kwargs or {}))

    class Checked(list):
        """Batches under the watch of NoSync: on while a step runs, off where the epoch ends."""

        def __iter__(self):
            with NoSync():
                yield from super().__iter__()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    fit(CPU(clip_norm=1.0, accumulate_steps=2), model, Checked(batches(*[4] * 40)), optimizer=optimizer)
    totals = Totals(torch.device("cpu"))
    totals.add(*CPU().loss_sum(model, batches(4)[0]))
    with NoSync(), pytest.raises(AssertionError, match="host sync"):
        totals.read()


# --- settings ----------------------------------------------------------------------------------------------


def test_steps_per_epoch_counts_optimizer_steps():
    assert CPU(accumulate_steps=4).steps_per_epoch(batches(*[2] * 9)) == 3
    assert CPU().steps_per_epoch(batches(*[2] * 9)) == 9


def test_channels_last_moves_the_model_and_four_dimensional_inputs_only():
    trainer = CPU(channels_last=True)
    model = trainer.place(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    picture, vector = torch.randn(2, 3, 5, 5), torch.randn(2, 5)
    assert trainer.to_device(picture).is_contiguous(memory_format=torch.channels_last)
    assert trainer.to_device(vector).is_contiguous()
    assert not CPU().to_device(picture).is_contiguous(memory_format=torch.channels_last)


def test_inputs_may_be_mappings_and_tuples():
    moved = CPU().to_device({"a": torch.ones(2), "b": (torch.zeros(1), torch.ones(1))})
    assert moved["a"].tolist() == [1, 1]
    assert [t.item() for t in moved["b"]] == [0, 1]


def test_compile_wraps_the_forward_and_trains_the_plain_module(monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda model: (wrapped.append(model), model)[1])
    model = mlp()
    start = parameters_of_model(model)
    fit(CPU(compile=True), model, batches(4))
    assert wrapped == [model]
    assert not torch.equal(parameters_of_model(model), start)
    fit(CPU(), model, batches(4))
    assert wrapped == [model]


@pytest.mark.slow
def test_a_compiled_forward_trains_like_the_plain_one_and_sees_masks_set_in_place(monkeypatch):
    # the tracing and its guards are what can go wrong; the default backend also needs a C++ compiler
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    class Zeroing(Recorder):
        def on_step_end(self):
            super().on_step_end()
            with torch.no_grad():
                self.model[0].weight[:4] = 0

    plain, compiled = mlp(), mlp()
    fit(CPU(), plain, batches(4, 4, 4), pruner=Zeroing(plain), epochs=2)
    fit(CPU(compile=True), compiled, batches(4, 4, 4), pruner=Zeroing(compiled), epochs=2)
    assert compiled[0].weight[:4].count_nonzero() == 0
    torch.testing.assert_close(parameters_of_model(compiled), parameters_of_model(plain))


def test_fused_is_asked_for_where_the_class_has_it_and_nobody_chose():
    model = mlp()
    assert make_optimizer(partial(torch.optim.SGD, lr=0.1), model).defaults["fused"] is True
    assert make_optimizer(partial(torch.optim.AdamW, lr=0.1), model).defaults["fused"] is True
    assert make_optimizer(partial(torch.optim.SGD, lr=0.1), model, fused=False).defaults["fused"] is None
    assert make_optimizer(partial(torch.optim.SGD, fused=False), model).defaults["fused"] is False
    assert make_optimizer(partial(torch.optim.SGD, foreach=True), model).defaults["fused"] is None
    assert "fused" not in make_optimizer(partial(torch.optim.RMSprop), model).defaults
    assert make_optimizer(partial(torch.optim.SGD, lr=0.1), model, lr=0.3).defaults["lr"] == 0.3


def test_an_optimizer_without_its_fused_form_falls_back():
    def sgd(parameters, *, fused=None):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors")
        return torch.optim.SGD(parameters, lr=0.1)

    assert make_optimizer(sgd, mlp()).defaults["fused"] is None


def test_only_trainable_parameters_are_optimized():
    model = mlp()
    model[0].requires_grad_(False)
    found = parameters_of(make_optimizer(partial(torch.optim.SGD, lr=0.1), model))
    assert [p is q for p, q in zip(found, model[2].parameters(), strict=True)] == [True, True]
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(partial(torch.optim.SGD, lr=0.1), model.requires_grad_(False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "trainer.precision=fp8 is not allowed: it must be one of fp32, bf16, fp16"),
        ({"accumulate_steps": 0}, "trainer.accumulate_steps=0 is not allowed: it must be 1 or more"),
        ({"distill": 1.0}, "trainer.distill=1.0 is not allowed: it must be from 0 to below 1"),
        ({"clip_norm": 0.0}, "trainer.clip_norm=0.0 is not allowed: it must be above 0, or null"),
        ({"dense_epochs": -1}, "trainer.dense_epochs=-1 is not allowed: it must be 0 or more"),
        (
            {"progress": "loud"},
            "trainer.progress=loud is not allowed: it must be one of auto, bar, lines, none",
        ),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        CPU(**settings)
    assert str(error.value) == message


def test_a_device_that_is_not_here_lists_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:3", "mps", "tpu", "cpu:x"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            Trainer(device=name)
        assert str(error.value) == (
            f"trainer.device={name} is not allowed: it must be one of those on this machine: auto, cpu"
        )
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with refused("trainer.device=cuda:2", "cuda:0", "cuda:1"):
        find_device("cuda:2")


# --- learning rate and repeatability -----------------------------------------------------------------------


def rates(schedule_of, *, total_steps, lr=1.0, **settings):
    optimizer = torch.optim.SGD(mlp().parameters(), lr=lr)
    schedule = schedule_of(optimizer, total_steps=total_steps, **settings)
    found = []
    for _ in range(total_steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warmup_cosine_values_at_every_step_and_after_the_end():
    found = rates(warmup_cosine, total_steps=6, lr=2.0, warmup=1 / 3)
    half = 1 / math.sqrt(2)
    assert found == pytest.approx([2 / 3, 4 / 3, 2, 1 + half, 1, 1 - half, 0, 0], abs=1e-12)


def test_cosine_without_warmup_ends_at_the_final_ratio():
    found = rates(warmup_cosine, total_steps=2, warmup=0.0, final_ratio=0.2)
    assert found == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_constant_keeps_the_rate_and_can_warm_up():
    assert rates(constant, total_steps=2) == [1, 1, 1, 1]
    assert rates(constant, total_steps=4, warmup=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_a_schedule_over_no_steps_is_harmless():
    assert rates(warmup_cosine, total_steps=0) == [1.0, 0.0]


def test_schedule_settings_out_of_range():
    with refused("lr_schedule.warmup=1.5", "0 to 1"):
        rates(warmup_cosine, total_steps=3, warmup=1.5)


def test_the_schedule_moves_once_per_optimizer_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    CPU(accumulate_steps=2).fit(
        model,
        batches(2, 2, 2),
        None,
        optimizer=optimizer,
        lr_schedule=warmup_cosine(optimizer, total_steps=4, warmup=0.0),
        pruner=Recorder(),
        epochs=2,
        on_step=lambda totals: seen.append(optimizer.param_groups[0]["lr"]),
    )
    half = math.sqrt(0.5) / 2
    assert seen == pytest.approx([0.5 + half, 0.5, 0.5 - half, 0.0], abs=1e-12)


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs():
    def trained(seed):
        seed_everything(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        data = list(zip(*joined(batches(8, 8)), strict=True))
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        values = []
        fit(CPU(), model, loader, epochs=2, on_epoch=lambda epoch, found: values.append(found["train/loss"]))
        return parameters_of_model(model), values

    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_seeding_covers_python_numpy_and_torch():
    import random

    import numpy as np

    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw() == draw()
    assert torch.are_deterministic_algorithms_enabled() is False
    seed_everything(7, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() is True
    seed_everything(7)
    assert torch.are_deterministic_algorithms_enabled() is False


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"nesterov": "abc", "momentum": 0.9}, ("optimizer.nesterov=abc", "true or false")),
        ({"momentum": "much"}, ("optimizer.momentum=much", "a number")),
    ],
)
def test_a_text_in_the_place_of_a_number_is_refused_before_a_step(settings, facts):
    with refused(*facts):
        make_optimizer(partial(torch.optim.SGD, lr=0.1, **settings), nn.Linear(2, 2))


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.99, 0.5], {"a": 1, "b": 2}, "0.9"])
def test_another_count_of_numbers_is_refused_before_a_step(betas):
    with refused(f"optimizer.betas={betas}", "2 numbers"):
        make_optimizer(partial(torch.optim.AdamW, betas=betas), nn.Linear(2, 2))
    assert make_optimizer(partial(torch.optim.AdamW, betas=[0.5, 0.9]), nn.Linear(2, 2)).defaults["betas"] == (0.5, 0.9)


# ---- batches, however they are wrapped


class Named(nn.Module):
    """Takes its inputs by name or in order, and answers as networks of transformers do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, scale):
        return SimpleNamespace(logits=self.net(x * scale[:, None]))


@dataclass
class Wrapped:
    x: torch.Tensor
    scale: torch.Tensor
    labels: torch.Tensor


class OfAClass(Named):
    def forward(self, batch):
        return super().forward(batch.x, batch.scale)


Fields = namedtuple("Fields", "x scale targets")


@pytest.mark.parametrize(
    ("wrap", "network"),
    [
        (lambda x, s, y: ({"x": x, "scale": s}, y), Named),
        (lambda x, s, y: (UserDict(x=x, scale=s), y), Named),
        (lambda x, s, y: ((x, s), y), Named),
        (lambda x, s, y: [[x, s], y], Named),
        (lambda x, s, y: {"scale": s, "x": x, "labels": y}, Named),
        (lambda x, s, y: UserDict(x=x, scale=s, label=y), Named),
        (Fields, Named),
        (Wrapped, OfAClass),
        (lambda x, s, y: (Wrapped(x, s, y), y), OfAClass),
    ],
)
def test_a_network_is_called_with_a_batch_as_it_is_traced(wrap, network):
    torch.manual_seed(1)
    data = [(x, torch.rand(len(x)), y) for x, y in batches(4, 3)]
    plain, model, losses = mlp(), network(), []
    scaled, wrapped = [(x * s[:, None], y) for x, s, y in data], [wrap(*batch) for batch in data]
    for net, loader in ((plain, scaled), (model, wrapped)):
        fit(CPU(), net, loader, val=loader, on_epoch=lambda epoch, values: losses.append(values["val/loss"]))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
