"""What every criterion and every network has to pass: one tester each; a subclass names the thing and its slow version.

A new criterion or network costs about ten lines: see `test_criteria.py` and `test_networks.py`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import nets
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gsprune import Pruner
from gsprune.criteria import Abs, Criterion, Weighted
from gsprune.discovery.find import find_structures
from gsprune.export import to_onnx
from gsprune.formats.network import load_pruned, save_pruned
from gsprune.schedules import Linear, OneShot
from gsprune.structures.example import call, map_tensors, tensors_in
from gsprune.structures.structure import INNER, Found, Structure
from gsprune.structures.twin import every_tensor
from gsprune.surgery.apply import with_ties
from gsprune.surgery.cut_plan import CutPlan
from gsprune.surgery.no_branch import inside
from gsprune.surgery.shrink import mask_units, shrink

OUTPUT = "feeds the model's output"
DEVICES = ["meta", *(["cuda"] if torch.cuda.is_available() else [])]
TINY = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

# ways of coupling units, each with the structure whose scores are compared
SAMPLES: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "neurons": (nets.mlp, TINY, "0"),
    "channels": (nets.ResNet, nets.images(), "conv1"),
    "stream": (nets.ResNet, nets.images(), "stem"),
    "flatten": (nets.flat, nets.images(), "0"),
    "depthwise": (nets.Mobile, nets.images(), "expand"),
    "concatenation": (nets.Dense, nets.images(), "conv1"),
    "heads": (nets.ViT, nets.images(), "blocks.1.attn"),
}


def sample(name: str) -> tuple[nn.Module, Tensor, Structure]:
    """A network in float64 with gradients, its input, and one of its structures."""
    make, x, _ = SAMPLES[name]
    torch.manual_seed(1)
    model, x = nets.settle(make()).double().train(), x.double()
    reference.loss(model(x)).backward()
    return model, x, _structure(name)


@functools.cache
def _structure(name: str) -> Structure:
    make, x, structure = SAMPLES[name]
    return next(s for s in find_structures(make(), x.to(torch.float32)).structures if s.name == structure)


class CriterionTester:
    """Conformance of a criterion.

    A subclass sets `make` and overrides `weight`, `unit` or both: the slow version of a score of a network with
    gradients, in float64. For what is cumulative that is what one step adds: a magnitude, unless it is signed.
    """

    make: ClassVar[Callable[..., Criterion]]
    by_rows: ClassVar[bool] = True  # whether a weight's score depends on its own row alone
    decays: ClassVar[Sequence[float]]

    def weight(self, model: nn.Module, name: str, x: Tensor) -> Tensor:
        raise NotImplementedError

    def unit(self, model: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __init_subclass__(cls) -> None:
        """Tests of what the criterion does not have are none of its tests."""
        criterion, decays = cls.make(), "decay" in inspect.signature(cls.make).parameters
        cls.ways = ["weights"] * criterion.scores_weights + ["units"] * criterion.scores_units
        if "decays" not in vars(cls):
            cls.decays = [1.0, 0.9, 0.3] if decays else [1.0]
        for name, has in {
            "test_the_other_way_is_refused": len(cls.ways) == 1,
            "test_rows_in_parts_give_the_scores_of_the_whole": criterion.scores_weights and cls.by_rows,
            "test_gradients_of_zero_score_zero": criterion.cumulative,
            "test_a_batch_that_is_not_finite_does_not_count": criterion.cumulative,
            "test_decay_outside_its_range_is_refused": decays,
        }.items():
            if not has:
                setattr(cls, name, None)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`way` is weights or units, as the criterion scores them; `coupling` is a sample to score in that way."""
        if "coupling" in metafunc.fixturenames:
            cases = [(way, name) for way in self.ways for name in (SAMPLES if way == "units" else ["neurons"])]
            metafunc.parametrize(("way", "coupling"), cases)
        elif "way" in metafunc.fixturenames:
            metafunc.parametrize("way", self.ways)
        if "decay" in metafunc.fixturenames and "running" in metafunc.function.__name__:
            metafunc.parametrize("decay", self.decays)

    # ---- the score of one step

    def test_a_step_equals_the_slow_version(self, way: str, coupling: str) -> None:
        criterion = type(self).make()
        model, x, structure = sample(coupling)
        if way == "units":
            score, expected = _units(criterion, model, structure), self.unit(model, structure, x)
        else:
            weight = model.get_parameter(name := f"{structure.name}.weight")
            score, expected = criterion.weights(weight.detach(), weight.grad, name=name), self.weight(model, name, x)
            out = torch.empty(weight.shape)
            given = criterion.weights(weight.detach(), weight.grad, name=name, out=out)
            torch.testing.assert_close(given.float(), score.float())
        rtol = 1e-9 if score.dtype == torch.float64 and way == "units" else 1e-6
        score = score.double() if criterion.signed else score.double().abs()
        torch.testing.assert_close(score, expected, rtol=rtol, atol=rtol * float(expected.max()))

    def test_the_other_way_is_refused(self) -> None:
        criterion = type(self).make()
        model, _, structure = sample("neurons")
        other = functools.partial(_units, criterion, model, structure)
        if criterion.scores_units:
            other = functools.partial(criterion.weights, torch.ones(2, 2), torch.ones(2, 2))
        with pytest.raises(ValueError, match=type(criterion).__name__):
            other()

    # ---- dtype and device

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_scores_are_float32_whatever_the_weights(self, way: str, dtype: torch.dtype) -> None:
        """Compared with the score of the same numbers in float64: nothing is rounded to the weights' dtype."""
        criterion = type(self).make()
        model = _mlp().to(dtype)
        pruner = _pruner(model, criterion, way)
        wide = copy.deepcopy(model).double()
        exact = _pruner(wide, criterion, way)
        for seed in range(3):
            _fill_gradients(model, seed)
            for name, parameter in wide.named_parameters():
                parameter.grad = model.get_parameter(name).grad.double()  # type: ignore[union-attr]
            _step(pruner)
            _step(exact)
        for name, score in pruner.scores().items():
            assert score.dtype == torch.float32
            torch.testing.assert_close(score, exact.scores()[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("device", DEVICES)
    def test_scores_lie_where_the_weights_do_and_no_value_is_looked_at(self, way: str, device: str) -> None:
        """The meta device has no values: reading one on the host raises."""
        criterion = type(self).make()
        model = _mlp().to(device)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if way == "weights":
            score = criterion.weights(model[0].weight.detach(), model[0].weight.grad, name="0.weight")
        else:
            score = _units(criterion, model, _moved(_structure("neurons"), device))
        assert (score.device.type, score.shape) == (device, (8, 6) if way == "weights" else (8,))

    # ---- parts

    def test_rows_in_parts_give_the_scores_of_the_whole(self) -> None:
        """What several processes do that have some rows each; one of them may have none."""
        criterion = type(self).make()
        weight, grad = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
        parts = [criterion.weights(w, g) for w, g in zip(weight.split([3, 0, 4]), grad.split([3, 0, 4]), strict=True)]
        assert torch.equal(torch.cat(parts), criterion.weights(weight, grad))

    # ---- the running score

    def test_the_running_score_equals_the_slow_version(self, way: str, decay: float) -> None:
        criterion = type(self).make(**({"decay": decay} if len(self.decays) > 1 else {}))
        model = _mlp().double()
        pruner = _pruner(model, criterion, way)
        steps: dict[str, list[Tensor]] = {name: [] for name in pruner.masks()}
        for seed in range(4):
            model.zero_grad()
            x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            reference.loss(model(x)).backward()
            for name, changes in steps.items():
                structure = _structure("neurons") if name == "0" else None
                slow = self.unit(model, structure, x) if structure else self.weight(model, name, x)
                changes.append(slow.detach())
            pruner.on_before_optimizer_step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=1e-4)  # type: ignore[arg-type]
        if not criterion.cumulative:
            steps = {name: [changes[-1]] for name, changes in steps.items()}
            model.load_state_dict(
                {n: p + 1e-4 * p.grad for n, p in model.named_parameters()}  # type: ignore[operator]
            )
            pruner.on_step_begin(0)
        running = {name: reference.accumulate(changes, decay) for name, changes in steps.items()}
        if (spread_decay := criterion.spread_decay) is not None:
            running |= {f"{n}:spread": reference.spread(changes, decay, spread_decay) for n, changes in steps.items()}
        assert pruner.scores().keys() == running.keys()
        for name, score in pruner.scores().items():
            slow = running[name] * pruner.masks()[name.removesuffix(":spread")]
            torch.testing.assert_close(score, slow.float(), rtol=1e-5, atol=1e-6)

    def test_gradients_of_zero_score_zero(self, way: str) -> None:
        criterion = type(self).make()
        model = _mlp()
        pruner = _pruner(model, criterion, way)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pruner.on_before_optimizer_step()
        assert not any(score.any() for score in pruner.scores().values())

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_batch_that_is_not_finite_does_not_count(self, way: str, bad: float) -> None:
        model = _mlp()
        pruner = _pruner(model, type(self).make(), way)
        _fill_gradients(model)
        pruner.on_before_optimizer_step()
        before = pruner.scores()
        for parameter in model.parameters():
            parameter.grad.view(-1)[0] = bad  # type: ignore[union-attr]
        pruner.on_before_optimizer_step()
        assert all(torch.equal(score, before[name]) for name, score in pruner.scores().items())

    def test_frozen_parameters_are_named_where_a_gradient_is_read(self, way: str) -> None:
        criterion, model = type(self).make(), _mlp().requires_grad_(False)
        if criterion.cumulative:
            with pytest.raises(ValueError, match=re.escape("requires_grad")) as error:
                _pruner(model, criterion, way)
            assert type(criterion).__name__ in str(error.value)
        else:
            pruner = _pruner(model, criterion, way)
            pruner.on_step_begin(0)
            assert pruner.sparsity == 0.5

    # ---- state

    def test_a_resumed_run_goes_on_with_the_same_bits(self, way: str) -> None:
        """Interrupted between two updates; the state travels through a file that is read without unpickling."""

        def run(pruner: Pruner, model: nn.Module, epochs: range) -> None:
            for epoch in epochs:
                pruner.on_epoch_begin(epoch)
                for step in range(2):
                    pruner.on_step_begin(step)
                    _fill_gradients(model, seed=2 * epoch + step)
                    pruner.on_before_optimizer_step()
                    pruner.on_step_end()
                pruner.on_epoch_end()

        schedule = Linear(end_epoch=3, update_frequency=0.5)
        model, again = _mlp(), _mlp()
        pruner, resumed = (
            _pruner(m, type(self).make(), way, schedule=schedule, steps_per_epoch=2) for m in (model, again)
        )
        run(pruner, model, range(2))
        file = io.BytesIO()
        torch.save([model.state_dict(), pruner.state_dict()], file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        again.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
        for one, network in ((pruner, model), (resumed, again)):
            run(one, network, range(2, 4))
        assert pruner.updates == resumed.updates > 2
        for of in (Pruner.scores, Pruner.masks):
            assert all(torch.equal(value, of(resumed)[name]) for name, value in of(pruner).items())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    def test_a_pickled_criterion_is_the_same(self) -> None:
        criterion = type(self).make()
        again = pickle.loads(pickle.dumps(criterion))
        assert (type(again), vars(again), repr(again)) == (type(criterion), vars(criterion), repr(criterion))

    @pytest.mark.parametrize("decay", [0.0, -0.5, 1.1, math.nan])
    def test_decay_outside_its_range_is_refused(self, decay: float) -> None:
        with pytest.raises(ValueError, match=rf"decay is {decay}.*\(0, 1\]"):
            type(self).make(decay=decay)


class InputsTester:
    """Conformance of a criterion that reads what a layer reads; `score` is its slow version, of one group."""

    make: ClassVar[Callable[..., Criterion]]

    def score(self, weight: Tensor, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    @pytest.mark.parametrize("groups", [1, 3])
    def test_scores_equal_the_slow_version(self, groups: int) -> None:
        weight, inputs = _layer(groups)
        score = type(self).make().from_inputs(weight, _gram(inputs))
        slow = torch.stack([self.score(w, x) for w, x in zip(weight, inputs, strict=True)])
        torch.testing.assert_close(score.double(), slow, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_scores_are_wide_whatever_the_weights(self, dtype: torch.dtype) -> None:
        """Compared with the score of the same numbers in float64."""
        weight, inputs = _layer(1)
        narrow = weight.to(dtype)
        score = type(self).make().from_inputs(narrow, _gram(inputs))
        assert score.dtype.itemsize >= 4
        torch.testing.assert_close(score, type(self).make().from_inputs(narrow.double(), _gram(inputs)))

    def test_an_input_that_is_always_0_scores_0(self) -> None:
        weight, inputs = _layer(1)
        inputs[:, :, 2] = 0
        score = type(self).make().from_inputs(weight, _gram(inputs))
        assert score.isfinite().all()
        assert not score[..., 2].any()
        assert bool(score[..., :2].all())

    def test_inputs_that_are_all_0_score_0(self) -> None:
        weight, inputs = _layer(2)
        assert not type(self).make().from_inputs(weight, _gram(inputs * 0)).any()

    def test_training_refuses_it_and_says_what_to_take(self) -> None:
        criterion = type(self).make()
        with pytest.raises(ValueError, match=rf"{type(criterion).__name__}.*gsprune\.cut.*Elementwise"):
            Pruner(_mlp(), criterion, target_sparsity=0.5)
        with pytest.raises(ValueError, match=type(criterion).__name__):
            criterion.weights(torch.ones(2, 2), torch.ones(2, 2))
        model, _, structure = sample("neurons")
        with pytest.raises(ValueError, match=type(criterion).__name__):
            _units(criterion, model, structure)

    def test_a_pickled_criterion_is_the_same(self) -> None:
        criterion = type(self).make()
        again = pickle.loads(pickle.dumps(criterion))
        assert (type(again), vars(again), repr(again)) == (type(criterion), vars(criterion), repr(criterion))


def _layer(groups: int) -> tuple[Tensor, Tensor]:
    """Weights (g, 5, 8) and correlated inputs (g, 40, 8) in float64."""
    generator = torch.Generator().manual_seed(groups)
    weight, mixed, noise = (
        torch.randn(groups, *shape, dtype=torch.float64, generator=generator) for shape in ((5, 8), (3, 8), (40, 8))
    )
    return weight, torch.randn(groups, 40, 3, dtype=torch.float64, generator=generator) @ mixed + 0.3 * noise


def _gram(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / inputs.shape[1]


def _mlp() -> nn.Module:
    torch.manual_seed(1)
    return nets.mlp()


def _pruner(model: nn.Module, criterion: Criterion, way: str, **options: Any) -> Pruner:
    example = torch.zeros(2, 6, dtype=next(model.parameters()).dtype)
    units = way == "units"
    options = {"target_sparsity": 0.5, "schedule": OneShot(), "include": ["0", "0.weight"][not units :][:1]} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how little of the model is targeted
        return Pruner(model, criterion, structured=units, example_input=example, **options)


def _fill_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def _step(pruner: Pruner) -> None:
    """One step, and for a criterion that looks at masks only when they are due, an update."""
    pruner.on_before_optimizer_step()
    if pruner.horizon == 0:
        pruner.on_step_begin(0)


def _units(criterion: Criterion, model: nn.Module, structure: Structure) -> Tensor:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return criterion.units(structure, lambda name: (parameters[name].detach(), parameters[name].grad))


def _moved(structure: Structure, device: str) -> Structure:
    from gsprune.pruner.targets import moved

    return moved(structure, torch.device(device))


@dataclass(frozen=True, eq=False)
class Network:
    """A network under test.

    Attributes:
        make: builds it; a random seed is set before.
        example: what it is called with: a tensor, a tuple, or a mapping of keyword arguments.
        found: its structures, as (name, kind, units) in order, or as the number of structures of each kind.
        skipped: a part of each reason for leaving something alone; every reason has to contain one of them. None: they
            are not looked at.
        trains: whether it takes its steps in training mode: not with dropout that `build` does not reach.
        kinds: of what is pruned; None: all but residual streams and branches.
        by_hand: gives its structures, of a network that the finder is not asked about.
        others: what else it may be called with, of other sizes.
        again: whether what was loaded is cut a second time.
        onnx: whether its smaller version is also written as ONNX (seconds).
    """

    make: Callable[[], nn.Module]
    example: Any
    found: Sequence[tuple[str, str, int]] | Mapping[str, int]
    skipped: Collection[str] | None = (OUTPUT,)
    trains: bool = True
    kinds: Sequence[str] | None = None
    by_hand: Callable[[nn.Module], Sequence[Structure]] | None = None
    others: Sequence[Any] = ()
    again: bool = False
    onnx: bool = False

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(5)
        model = nets.settle(self.make()).to(dtype)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():  # torchvision's ViT: no gradient passes it
                nn.init.normal_(module.weight, std=0.02)
            for name in ("p", "dropout"):  # its random numbers differ between the masked and the cut network
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        return model.train(self.trains)

    def input(self, dtype: torch.dtype = torch.float64) -> Any:
        return self.inputs(dtype)[0]

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """The example and the others."""
        return [
            map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t.clone(), example)
            for example in (self.example, *self.others)
        ]

    def find(self, model: nn.Module, x: Any, **names: Any) -> Found:
        """What the finder says, or the hand."""
        return find_structures(model, x, **names) if self.by_hand is None else Found((*self.by_hand(model),), (), {})


@functools.cache
def pruner_of(network: Network) -> Pruner:
    """A pruner that removes half of every structure. Tracing takes most of the time, so all tests share it."""
    options = {"schedule": OneShot(), "example_input": network.input(), "steps_per_epoch": 2, "epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gsprune.discovery.find.find_structures", network.find)
        return Pruner(network.build(), Weighted(), target_sparsity=0.5, kinds=network.kinds, **options)


def structures_of(network: Network) -> list[Structure]:
    return [target.structure for target in pruner_of(network).targets]


class Cut:
    """A network after two steps of training, masked and cut at random, each with its optimizer."""

    def __init__(self, network: Network, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        self.network, self.x, self.structures = network, network.input(), structures_of(network)
        self.keeps = uneven(self.structures)
        self.small = network.build()
        self.small_optimizer = optimizer(self.small.parameters())
        for _ in range(2):  # moments to carry over
            train_step(self.small, self.small_optimizer, self.x)
        self.masked = reference.masked(self.small, self.structures, self.keeps)
        self.masked_optimizer = optimizer(self.masked.parameters())
        self.masked_optimizer.load_state_dict(copy.deepcopy(self.small_optimizer.state_dict()))  # else they share it
        self.plan = shrink(
            self.small, self.structures, self.keeps, example_input=self.x, optimizer=self.small_optimizer
        )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.001, weight_decay=0.1, amsgrad=True),
}


FLAGS = {"test_the_loaded_network_is_cut_again": "again", "test_the_smaller_network_as_onnx": "onnx"}


class NetworkTester:
    """Conformance of networks: what is found in them, and that the cut one is the masked one."""

    networks: ClassVar[Mapping[str, Network]]
    optimizers: ClassVar[Sequence[str]] = ("adamw",)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One network after the other, each built and cut once for all tests."""
        names = metafunc.fixturenames
        if "cut" in names:
            cases = [(name, optimizer) for name in self.networks for optimizer in self.optimizers]
            ids = ["-".join(case if len(self.optimizers) > 1 else case[:1]) for case in cases]
            metafunc.parametrize("cut", cases, ids=ids, indirect=True, scope="class")
        elif "network" in names:
            flag = FLAGS.get(metafunc.function.__name__)
            meant = {name: network for name, network in self.networks.items() if not flag or getattr(network, flag)}
            metafunc.parametrize("network", meant.values(), ids=meant, scope="class")

    def __init_subclass__(cls) -> None:
        """A test that is meant for none of the networks is none of theirs."""
        for test, flag in FLAGS.items():
            if not any(getattr(network, flag) for network in cls.networks.values()):
                setattr(cls, test, None)

    @pytest.fixture(scope="class")
    @classmethod
    def cut(cls, request: pytest.FixtureRequest) -> Cut:
        name, optimizer = request.param
        return Cut(request.cls.networks[name], OPTIMIZERS[optimizer])

    def test_structures_are_found_and_the_rest_is_skipped_with_a_reason(self, network: Network) -> None:
        structures, skipped = structures_of(network), pruner_of(network).skipped
        if isinstance(network.found, Mapping):
            assert Counter(s.kind for s in structures) == network.found
        else:
            assert [(s.name, s.kind, s.units) for s in structures] == list(network.found)
        for name, reason in skipped.items() if network.skipped is not None else ():
            assert any(part in reason for part in network.skipped), f"{name}: {reason}"
        for part in network.skipped or ():
            assert any(part in reason for reason in skipped.values()), part

    def test_masked_equals_cut(self, cut: Cut) -> None:
        """In float64: the outputs in both modes and with PyTorch's fast paths, the parameters and the buffers."""
        assert sum(p.numel() for p in cut.small.parameters()) < sum(p.numel() for p in cut.masked.parameters())
        assert cut.small.training == cut.network.trains
        for name, cuts in cut.plan.kept.items():
            for dim, kept in cuts.items():
                assert every_tensor(cut.small, every_name=True)[name].shape[dim] == len(kept)
        for training in {False, cut.network.trains}:
            pair = [copy.deepcopy(model).train(training) for model in (cut.small, cut.masked)]
            for context in (torch.no_grad(), torch.enable_grad()):
                with context:
                    assert_equal_answers(*pair, cut.x)
        assert_same_state(cut.masked, cut.small, cut.plan)
        for x in cut.network.inputs()[1:]:
            assert_equal_answers(*(copy.deepcopy(model).eval() for model in (cut.small, cut.masked)), x)

    def test_the_optimizer_follows(self, cut: Cut) -> None:
        """The next step is that of the masked network; gains of RMSNorms, which the cut has scaled, take another."""
        small, masked = (
            copy.deepcopy(pair) for pair in ((cut.small, cut.small_optimizer), (cut.masked, cut.masked_optimizer))
        )
        for model, optimizer in (small, masked):
            train_step(model, optimizer, cut.x)
        assert {id(p) for group in small[1].param_groups for p in group["params"]} == {*map(id, small[0].parameters())}
        assert all(p.grad is not None and p.grad.shape == p.shape for p in small[0].parameters())
        assert_same_state(masked[0], small[0], cut.plan, gains=False)

    def test_saved_and_loaded_into_a_fresh_dense_network(self, cut: Cut, tmp_path: Path) -> None:
        save_pruned(tmp_path, cut.small, cut.plan)
        loaded = load_pruned(tmp_path, cut.network.build().requires_grad_(True))
        expected = answers(copy.deepcopy(cut.small).eval(), cut.x)
        dense = [name for name in cut.network.build().state_dict() if not inside(name, cut.plan.removed)]
        assert list(loaded.state_dict()) == dense
        assert not loaded.training
        parametrised = any(is_parametrized(module) for module in loaded.modules())  # PyTorch pickles none of these
        for model in (loaded, *([] if parametrised else [pickle.loads(pickle.dumps(loaded))])):
            assert all(torch.equal(a, b) for a, b in zip(answers(model, cut.x), expected, strict=True))

    def test_the_loaded_network_is_cut_again(self, network: Network, tmp_path: Path) -> None:
        first = Cut(network, OPTIMIZERS["sgd"])
        save_pruned(tmp_path, first.small, first.plan)
        model = load_pruned(tmp_path, network.build())
        structures = [s for s in network.find(model, first.x).structures if s.kind in (network.kinds or INNER)]
        left = {s.name: int(keep.sum()) for s, keep in zip(first.structures, first.keeps, strict=True)}
        # one key/value head that is left stays, and its query heads are units
        assert all(s.units == left[s.name] or (s.kind == "heads" and left[s.name] == 1) for s in structures)
        masked = reference.masked(model, structures, uneven(structures))
        shrink(model, structures, uneven(structures), example_input=first.x)
        assert_equal_answers(model, masked, first.x)

    def test_gates_are_those_of_the_criteria(self, network: Network) -> None:
        """`Abs` and `Weighted` of every structure equal the plain sums over its consumers and its gates."""
        model, x = network.build(), network.input()
        train_loss(model, x).backward()
        for structure in structures_of(network):
            for criterion, members in ((Abs(), structure.consumers), (Weighted(), structure.gates)):
                plain = reference.gate_sums(model, members)
                torch.testing.assert_close(_units(criterion, model, structure), plain, rtol=1e-6, atol=1e-12)
            if structure.kind == "heads":  # a gate on the values is one on the output of the head
                values, heads = (reference.gate_sums(model, m) for m in (structure.gates, structure.consumers))
                torch.testing.assert_close(values, heads, rtol=1e-7, atol=1e-10)

    def test_masks_are_those_of_the_slow_version(self, network: Network) -> None:
        model, structures = network.build(), structures_of(network)
        slow = reference.masked(model, structures, uneven(structures))
        mask_units(model, structures, uneven(structures))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), slow.parameters(), strict=True))

    def test_a_pruner_removes_half_and_training_goes_on(self, network: Network) -> None:
        pruner, x = pruner_of(network), network.input()
        model = pruner.model
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        pruner.attach(optimizer)
        for _ in range(3):
            train_step(model, optimizer, x)
        masked = copy.deepcopy(model)
        assert pruner.finish() is model
        branches = [share for share in pruner.shares().values() if share.of == "branches"]
        assert sum(share.pruned for share in branches) == (len(branches) + 1) // 2
        assert all(s.pruned == (s.total + 1) // 2 for s in pruner.shares().values() if s.of != "branches")
        assert_equal_answers(*(copy.deepcopy(m).eval() for m in (model, masked)), x)
        train_step(model, optimizer, x)
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.slow
    def test_the_smaller_network_as_onnx(self, network: Network, tmp_path: Path) -> None:
        """`to_onnx` itself compares the file with PyTorch, for several sizes of a batch."""
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        cut = Cut(network, OPTIMIZERS["sgd"])
        small, x = cut.small.float().eval(), network.input(torch.float32)
        assert to_onnx(small, x, tmp_path / "net.onnx") < 1e-4
        dense = sum(p.numel() for p in cut.masked.parameters())
        count = sum(p.numel() for p in small.parameters())
        assert (tmp_path / "net.onnx").stat().st_size < 4 * count + 4 * (dense - count) / 2 + 100_000


def answers(model: nn.Module, x: Any) -> list[Tensor]:
    """The floating-point outputs; of a model of transformers its logits, for a cache has the shape of the heads."""
    output = call(model, map_tensors(Tensor.clone, x))
    return [output["logits"]] if isinstance(output, Mapping) and "logits" in output else list(tensors_in(output))


def assert_equal_answers(model: nn.Module, other: nn.Module, x: Any) -> None:
    for a, b in zip(answers(model, x), answers(other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))


def assert_same_state(masked: nn.Module, small: nn.Module, plan: CutPlan, *, gains: bool = True) -> None:
    large, cuts = masked.state_dict(), with_ties(masked, plan).kept
    for name, tensor in small.state_dict().items():
        expected = large[name]
        for dim, kept in cuts.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        norm = small.get_submodule(name.rpartition(".")[0])
        if hasattr(norm, "dense_norm"):  # an RMSNorm over fewer entries
            if not gains:
                continue
            expected = expected * math.sqrt(norm.dense_norm[0] / len(tensor))
        torch.testing.assert_close(tensor, expected, rtol=1e-8, atol=1e-10)


def train_loss(model: nn.Module, x: Any) -> Tensor:
    return torch.stack([(answer - 1 / 3).square().mean() for answer in answers(model, x)]).sum()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any) -> None:
    optimizer.zero_grad()
    train_loss(model, x).backward()
    optimizer.step()


def uneven(structures: Sequence[Structure]) -> list[Tensor]:
    """About half of the units of every structure, at random, and one more in every other; every other branch."""
    generator = torch.Generator().manual_seed(6)
    counts = [max(1, s.units // 2 + (i % 2 if s.units > 2 else 0)) for i, s in enumerate(structures)]
    keeps = [torch.randperm(s.units, generator=generator) < n for s, n in zip(structures, counts, strict=True)]
    branches = [s.name for s in structures if s.kind == "branches"]
    pairs = zip(structures, keeps, strict=True)
    return [k if s.kind != "branches" else k & bool(branches.index(s.name) % 2) for s, k in pairs]
