"""Files of Intel Neural Compressor: what becomes of each field, what is refused, and that the result prunes.

The files in tests/inc are in that format; tests/golden holds the settings the ancestor itself was run with.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import loops
import nets
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from gsprune.conf import schemas
from gsprune.criteria import Elementwise
from gsprune.integrations.inc import IncConfig, load_inc_config, main
from gsprune.schedules import Linear

HERE = Path(__file__).parents[1]
INC = HERE / "inc"
CASES: dict[str, Any] = json.loads((HERE / "golden" / "manifest.json").read_text())["cases"]
SCHEDULES = json.loads((HERE / "golden" / "schedule.json").read_text())
HEADS = {"target": 2, "importance_inputs": ["head_mask"], "importance_metric": "abs_gradient"}
NEURONS = {"target": 2, "importance_inputs": ["fc.weight"], "importance_metric": "weighted_gradient"}
STARS = "* in names stands for any text here; the ancestor read it as the number of a layer"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "conf.yaml"


def written(file: Path, *pruners: dict[str, Any], **common: Any) -> IncConfig:
    """The configuration of a file with these `!Pruner`s; JSON is YAML."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in common.items()]
    listed = ", ".join(f"!Pruner {json.dumps(pruner)}" for pruner in pruners)
    lines.append(f"pruners: [{listed}]")
    file.write_text(f"pruning: {{approach: {{weight_compression: {{{', '.join(lines)}}}}}}}\n")
    return load_inc_config(file)


def sensitive(names: list[str], parameters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"prune_type": "gradient_sensitivity", "names": names, "parameters": parameters, **fields}


def node(criterion: dict[str, Any], schedule: dict[str, Any], include: list[str], **rest: Any) -> dict[str, Any]:
    return {
        "_target_": "gsprune.Rule",
        "criterion": criterion,
        "schedule": schedule,
        "scope": "local",
        "include": include,
        **rest,
    }


def gate(name: str) -> dict[str, Any]:
    return {"_target_": f"gsprune.criteria.{name}", "decay": 1.0, "normalize": False}


def linear(initial: float, start: float, end: float, frequency: float) -> dict[str, Any]:
    return {
        "_target_": "gsprune.schedules.Linear",
        "initial_sparsity": initial,
        "start_epoch": start,
        "end_epoch": end,
        "update_frequency": frequency,
    }


def at_once(start: float) -> dict[str, Any]:
    return {"_target_": "gsprune.schedules.OneShot", "start_epoch": start}


ELEMENTWISE = {"_target_": "gsprune.criteria.Elementwise", "decay": 1.0}
MAGNITUDE = {"_target_": "gsprune.criteria.Magnitude"}

# ---- the whole of each file


def test_heads_and_neurons() -> None:
    found = load_inc_config(INC / "heads_and_neurons.yaml")
    projections = [f"layer.*.attention.{name}" for name in ("query", "key", "value")]
    assert found.rules == (
        node(gate("Abs"), at_once(1.0), projections, keep={"heads": 2}, structured=True),
        node(gate("Weighted"), at_once(1.0), ["layer.*.inner"], keep={"neurons": 4}, structured=True),
    )
    assert found.notes == (
        "the file: model has no meaning here: the model is given to the Pruner",
        "the file: tuning has no meaning here: nothing is tuned to an accuracy",
        "pruner 1 (line 11): end_epoch has no meaning here: units go all at once, after a whole epoch of scores",
        "pruner 1 (line 11): update_frequency has no meaning here: units go all at once, after a whole epoch of scores",
        "pruner 1 (line 11): normalize has no effect: each layer keeps the same count, whatever its scores are divided "
        "by",
        "pruner 1 (line 11): stride 3 is not needed: the size of a head is read off the model",
        f"pruner 1 (line 11): {STARS}",
        "pruner 2 (line 29): is part of pruner 1 (line 11): columns that read a unit are cut with it",
        f"pruner 3 (line 40): {STARS}",
        "pruner 4 (line 51): is part of pruner 3 (line 40): columns that read a unit are cut with it",
    )


def test_weights() -> None:
    found = load_inc_config(INC / "weights.yaml")
    first = {"target_sparsity": 0.8, "pattern": "1x1", "per_channel": False, "structured": False}
    second = {"target_sparsity": 0.5, "pattern": "1x2", "per_channel": True, "structured": False}
    assert found.rules == (
        node(ELEMENTWISE, linear(0.1, 1.0, 4.0, 2.0), ["0.weight"], **first),
        node(MAGNITUDE, linear(0.0, 2.0, 3.0, 1.0), ["2.weight"], **second),
    )
    assert found.notes == (
        "pruner 1 (line 10): biases among the names are left alone, as the ancestor did",
        "pruner 2 (line 14): initial_sparsity is 0 here as written; the ancestor took a 0 for none, and so the 0.1 of "
        "weight_compression",
    )


def test_defaults_are_the_ancestors() -> None:
    found = load_inc_config(INC / "few_fields.yaml")
    rest = {"target_sparsity": 0.97, "pattern": "1x1", "per_channel": False, "structured": False}
    assert found.rules == (node(MAGNITUDE, linear(0.0, 0.0, 4.0, 1.0), ["*"], **rest),)
    assert found.notes == (
        "pruner 1 (line 6): target_sparsity is 0.97, the ancestor's default, as the file has none",
        "pruner 1 (line 6): end_epoch is 4, the ancestor's default, as the file has none",
        "pruner 1 (line 6): without names all linear and convolution weights are pruned, but not embeddings",
    )


def test_fields_without_meaning() -> None:
    found = load_inc_config(INC / "without_meaning.yaml")
    rest: dict[str, Any] = {"target_sparsity": 0.9, "per_channel": False, "structured": False}
    assert found.rules == (
        node(ELEMENTWISE, linear(0.0, 0.0, 5.0, 0.5), ["encoder.*.fc[[]1].weight"], pattern="2x2", **rest),
        node(MAGNITUDE, linear(0.0, 2.0, 5.0, 1.0), ["fc.weight"], pattern="1x1", **rest),
        node(gate("Weighted"), at_once(3.0), ["encoder.attn.v", "encoder.attn.k"], keep={"heads": 5}, structured=True),
        node(gate("Weighted"), at_once(3.0), ["conv1"], keep={"channels": 16}, structured=True),
    )
    unread = "has no meaning here: the ancestor did not read it for this prune_type either"
    exclude = f"{unread} (the Pruner's exclude leaves names alone)"
    steps = "has no meaning here: schedules here count in epochs"
    taken = "is that of weight_compression, which the ancestor did not read"
    assert found.notes == (
        "the file: version has no meaning here: it counts the releases of neural-compressor",
        "the file: device has no meaning here: pruning runs where the model is",
        "pruning: train has no meaning here: training is the training loop's",
        f"weight_compression: excluded_names {exclude}",
        f"weight_compression: prune_layer_type {unread}",
        f"weight_compression: max_sparsity_ratio_per_layer {unread}",
        f"pruner 1 (line 21): start_step {steps}",
        f"pruner 1 (line 21): end_step {steps}",
        f"pruner 1 (line 21): prune_domain {unread}",
        f"pruner 1 (line 21): sparsity_decay_type {unread}",
        f"pruner 1 (line 21): extra_excluded_names {exclude}",
        f"pruner 1 (line 21): prune_type {taken}",
        "pruner 1 (line 21): start_epoch is 0 here as written; the ancestor took a 0 for none, and so the 2 of "
        "weight_compression",
        f"pruner 1 (line 21): update_frequency {taken}",
        "pruner 1 (line 21): update_frequency 0.5 updates the masks that often here; the ancestor did so at the "
        "beginning of epochs alone",
        f"pruner 1 (line 21): names {taken}",
        f"pruner 1 (line 21): {STARS}",
        f"pruner 1 (line 21): pattern {taken}",
        "pruner 2 (line 29): parameters have no meaning here: basic_magnitude has none",
        "pruner 3 (line 35), parameters: index has no meaning here: it is a layer's row in the head mask, and there is "
        "none",
        "pruner 3 (line 35): target_sparsity has no meaning here: target counts the units that are left",
        "pruner 3 (line 35): method has no meaning here: it is for single weights",
        "pruner 4 (line 46): is part of pruner 3 (line 35), which cuts the same units",
        "pruner 3 (line 35): stride 64 is not needed: the size of a head is read off the model",
        "pruner 3 (line 35): importance_inputs are not all among the names: here all rows of a unit are scored",
    )


@pytest.mark.parametrize("name", ["heads_and_neurons", "weights", "few_fields", "without_meaning"])
def test_results_fit_the_schemas(name: str) -> None:
    """They are what `pruner=...` composes: no key and no type but those Hydra accepts there."""
    parts = {"OneShot": "one_shot", "Linear": "ramp", "Elementwise": "elementwise", "Magnitude": "magnitude"}
    for config in load_inc_config(INC / f"{name}.yaml").rules:
        merged = OmegaConf.merge(OmegaConf.structured(schemas.RuleConfig), config)
        assert OmegaConf.to_container(merged.include) == config["include"]
        for part in ("criterion", "schedule"):
            target = config[part]["_target_"].rpartition(".")[2]
            schema = schemas.SCHEMAS[f"gsprune_{parts.get(target, 'gate')}"]
            open_ = {"target_sparsity": None} if part == "schedule" else {}  # the rule has it
            assert dict(OmegaConf.merge(OmegaConf.structured(schema), config[part])) == {**open_, **config[part]}


# ---- the settings the ancestor was recorded with


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.get("kind") == "elementwise"])
def test_recorded_weight_pruners(case: str, file: Path) -> None:
    conf = CASES[case]["conf"]
    pruner = {"prune_type": "gradient_sensitivity", **conf}
    if case == "ew_mlp_sparsity1":  # the ancestor raised an IndexError in its first epoch
        with pytest.raises(ValueError, match=r"pruner 1 \(line 1\): target_sparsity is 1.0: it must be in \[0, 1\)$"):
            written(file, pruner)
        return
    [found] = written(file, pruner).rules
    schedule = linear(
        conf.get("initial_sparsity", 0.0), conf["start_epoch"], conf["end_epoch"], conf.get("update_frequency", 1)
    )
    assert found == node(
        ELEMENTWISE,
        schedule,
        conf["names"],
        target_sparsity=conf["target_sparsity"],
        pattern=conf.get("pattern", "1x1").removeprefix("tile_pattern_"),
        per_channel=conf.get("method") == "per_channel",
        structured=False,
    )


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.get("kind") == "structured"])
def test_recorded_unit_pruners(case: str, file: Path) -> None:
    pruners = [{"prune_type": "gradient_sensitivity", **pruner} for pruner in CASES[case]["pruners"]]
    if case == "st_weighted_stride4":  # the ancestor cut beyond the end of the tensor
        with pytest.raises(ValueError, match=r"neurons are removed one by one here, set stride to 1 and target to 32$"):
            written(file, *pruners)
        return
    kept = [(found["criterion"], found["keep"], found["include"]) for found in written(file, *pruners).rules]
    bert = "bert.encoder.layer.*."
    heads = [f"{bert}attention.self.{name}" for name in ("query", "key", "value")]
    targets = {pruner["parameters"]["importance_metric"]: pruner["parameters"]["target"] for pruner in pruners}
    expected = []
    if "abs_gradient" in targets:
        expected.append((gate("Abs"), {"heads": targets["abs_gradient"]}, heads))
    if "weighted_gradient" in targets:
        neurons = {"neurons": targets["weighted_gradient"]}
        expected.append((gate("Weighted"), neurons, [f"{bert}intermediate.dense"]))
    assert kept == expected


def test_schedules_are_the_ancestors(file: Path) -> None:
    """Written in a file and built, each of the recorded schedules asks for the recorded sparsities."""
    model = nn.Linear(4, 4)
    for setting in SCHEDULES:
        fields = {
            "initial_sparsity": setting["initial"],
            "target_sparsity": setting["target"],
            "start_epoch": setting["start"],
            "end_epoch": setting["end"],
            "update_frequency": setting["freq"],
        }
        config = written(file, {"prune_type": "gradient_sensitivity", "names": ["weight"], **fields})
        [pruner] = config.build(model).parts
        schedule = pruner.schedules[0]
        assert isinstance(schedule, Linear)
        assert [schedule(epoch) for epoch in range(12)] == setting["sparsity"]


# ---- what the result does


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nets.BertAttention(), nn.LayerNorm(8)
        self.inner, self.outer = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return self.head(x.mean(1))


def test_heads_and_neurons_are_cut() -> None:
    """Two epochs with both pruners of the file: what is left are the units with the highest scores of the first."""
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = [(torch.randn(6, 5, 8), torch.randint(3, (6,))) for _ in range(3)]
    config = load_inc_config(INC / "heads_and_neurons.yaml")
    pruner = config.build(model, example_input=batches[0][0], steps_per_epoch=3, epochs=2, optimizer=optimizer)
    loops.train(pruner, model, optimizer, lambda _: batches, last=1)
    assert pruner.sparsity == 0
    expected = [part.scores() for part in pruner.parts]
    loops.train(pruner, model, optimizer, lambda _: batches, first=1, last=2)
    for part, scores, kept in zip(pruner.parts, expected, (2, 4), strict=True):
        for name, mask in part.masks().items():
            assert sorted(mask.nonzero().flatten().tolist()) == sorted(scores[name].topk(kept).indices.tolist())
    pruner.on_train_end()
    for layer in model.layer:
        assert layer.attention.query.weight.shape == layer.attention.value.weight.shape == (6, 8)
        assert layer.attention.out.weight.shape == (8, 6)
        assert layer.attention.num_attention_heads == 2
        assert layer.inner.weight.shape == (4, 8)
        assert layer.outer.weight.shape == (8, 4)
    assert model(batches[0][0]).shape == (6, 3)


def test_weights_are_pruned() -> None:
    """As many in each tensor as the schedules of the file say, epoch by epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))
    pruner = load_inc_config(INC / "weights.yaml").build(model)
    by_gradient, _ = pruner.parts
    assert by_gradient.criterion.decay == 1.0
    assert isinstance(by_gradient.criterion, Elementwise)
    x, reached = torch.randn(16, 10), []
    for epoch in range(6):
        pruner.on_epoch_begin(epoch)
        pruner.on_step_begin(0)
        model(x).square().mean().backward()
        pruner.on_before_optimizer_step()
        reached.append((int((model[0].weight == 0).sum()), int((model[2].weight == 0).sum())))
    # of 60: 0.1 at once, 0.1 + 0.7 * 2/4 one epoch later, 0.1 + 0.7 * 4/4; of 24 in tiles of two, row by row
    assert reached == [(0, 0), (6, 0), (27, 8), (27, 16), (48, 16), (48, 16)]
    assert [int((row == 0).sum()) for row in model[2].weight] == [4, 4, 4, 4]


def test_a_file_becomes_a_choice_of_the_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(INC / "heads_and_neurons.yaml")]) == 0
    text, config = capsys.readouterr().out, load_inc_config(INC / "heads_and_neurons.yaml")
    found = yaml.safe_load(text)
    assert found["defaults"] == ["/gsprune_rules@_here_", "_self_"]
    assert found["rules"] == [*config.rules]
    assert [line[2:] for line in text.splitlines() if line.startswith("#")] == [*config.notes]
    assert set(found["rules"][0]) <= {field.name for field in dataclasses.fields(schemas.RuleConfig)}


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'none.yaml'}: it cannot be read (No such file or directory)\n"


def test_names_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"include pattern '0.weight' matches nothing that can be pruned"):
        load_inc_config(INC / "weights.yaml").build(nn.Linear(2, 2))


# ---- what is refused

ONE = "pruner 1 (line 1)"
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "unknown field": (
        [{"prune_typ": "basic_magnitude"}],
        f"{ONE} has an unknown field 'prune_typ'; did you mean 'prune_type'?",
    ),
    "unknown parameter": (
        [sensitive(["q.weight"], {**HEADS, "strides": 64})],
        f"{ONE}, parameters has an unknown field 'strides'; did you mean 'stride'?",
    ),
    "unknown prune_type": (
        [{"prune_type": "gradient_sensitivty"}],
        f"{ONE}: prune_type is 'gradient_sensitivty': it must be 'gradient_sensitivity' or 'basic_magnitude'; did "
        f"you mean 'gradient_sensitivity'?",
    ),
    "pattern_lock": (
        [{"prune_type": "pattern_lock"}],
        f"{ONE}: prune_type 'pattern_lock' has no counterpart here: it keeps the zeros of a model that is sparse "
        f"already and prunes nothing",
    ),
    "group_lasso": (
        [{"prune_type": "group_lasso", "parameters": {"alpha": 0.006, "pattern": "tile_pattern_1x2"}}],
        f"{ONE}: prune_type 'group_lasso' has no counterpart here: it adds a penalty to the loss",
    ),
    "snip_momentum": (
        [{"prune_type": "snip_momentum"}],
        f"{ONE}: prune_type 'snip_momentum' has no counterpart here: it belongs to the later pruners, and is "
        f"pruner=elementwise with pruner.criterion.decay=0.9",
    ),
    "unknown metric": (
        [sensitive(["q.weight"], {**HEADS, "importance_metric": "abs_gradients"})],
        f"{ONE}: importance_metric is 'abs_gradients': it must be 'abs_gradient' or 'weighted_gradient'; did you "
        f"mean 'abs_gradient'?",
    ),
    "abs without a head mask": (
        [sensitive(["fc.weight"], {**HEADS, "importance_inputs": ["fc.weight"]})],
        f"{ONE}: importance_inputs is ['fc.weight']: for abs_gradient it must be ['head_mask']",
    ),
    "weighted with a head mask": (
        [sensitive(["fc.weight"], {**NEURONS, "importance_inputs": ["head_mask"]})],
        f"{ONE}: importance_inputs is ['head_mask']: for weighted_gradient it must be names of weights and biases",
    ),
    "weighted without inputs": (
        [sensitive(["fc.weight"], {**NEURONS, "importance_inputs": []})],
        f"{ONE}: importance_inputs is []: for weighted_gradient it must be names of weights and biases",
    ),
    "no target": (
        [sensitive(["fc.weight"], {key: NEURONS[key] for key in NEURONS if key != "target"})],
        f"{ONE}: parameters has no target",
    ),
    "target is no count": (
        [sensitive(["fc.weight"], {**NEURONS, "target": 0.5})],
        f"{ONE}: target is 0.5: it must be a whole number, 1 or more",
    ),
    "transpose is a word": (
        [sensitive(["fc.weight"], {**NEURONS, "transpose": "no"})],
        f"{ONE}: transpose is 'no': it must be true or false",
    ),
    "neurons with a stride": (
        [sensitive(["fc.weight"], {**NEURONS, "stride": 4})],
        f"{ONE}: stride is 4: neurons are removed one by one here, set stride to 1 and target to 8",
    ),
    "units without names": (
        [{"prune_type": "gradient_sensitivity", "parameters": HEADS}],
        f"{ONE}: names is empty: whole units need the names of the tensors they live in",
    ),
    "readers alone": (
        [sensitive(["attention.out.weight"], {**HEADS, "transpose": True})],
        f"{ONE}: transpose names the readers of units, but no !Pruner with transpose false, the same "
        f"importance_metric and the same importance_inputs names the units",
    ),
    "readers of other units": (
        [
            sensitive(["attention.query.weight"], HEADS),
            sensitive(["attention.out.weight"], {**HEADS, "target": 3, "transpose": True}),
        ],
        f"pruner 2 (line 1): target is 3, but 2 in {ONE}, which cuts the same units",
    ),
    "names is a word": (
        [{"names": "fc.weight"}],
        f"{ONE}: names is 'fc.weight': it must be a list of names",
    ),
    "names holds a number": (
        [{"names": ["fc.weight", 1]}],
        f"{ONE}: names is ['fc.weight', 1]: it must be a list of names",
    ),
    "nothing but biases": (
        [{"names": ["fc.bias"]}],
        f"{ONE}: names has nothing but biases, which are not pruned",
    ),
    "sparsity is a word": (
        [{"target_sparsity": "90%"}],
        f"{ONE}: target_sparsity is '90%': it must be a number, below 1,000,000,000",
    ),
    "sparsity above 1": (
        [{"target_sparsity": 90}],
        f"{ONE}: target_sparsity is 90.0: it must be in [0, 1)",
    ),
    "end before start": (
        [{"start_epoch": 5, "end_epoch": 3}],
        f"{ONE}: end_epoch 3.0 is before start_epoch 5.0",
    ),
    "units before the start": (
        [sensitive(["fc.weight"], NEURONS, start_epoch=-1)],
        f"{ONE}: start_epoch is -1.0: it must be 0 or more",
    ),
    "method": (
        [{"method": "per_layer"}],
        f"{ONE}: method is 'per_layer': it must be 'per_tensor' or 'per_channel'; did you mean 'per_tensor'?",
    ),
    "pattern": (
        [{"pattern": "tile_pattern_2:4"}],
        f"{ONE}: pattern is 'tile_pattern_2:4': it must be a tile such as 'tile_pattern_4x1'",
    ),
    "parameters is a list": (
        [sensitive(["fc.weight"], [])],  # type: ignore[arg-type]
        f"{ONE}, parameters is a list: it must be a mapping of fields",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_pruners(case: str, file: Path) -> None:
    pruners, message = REFUSED[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        written(file, *pruners)
    assert str(error.value) == f"{file}: {message}"


WITHIN = "it must have pruning.approach.weight_compression.pruners"
LISTED = "pruning: {{approach: {{weight_compression: {{pruners: {}}}}}}}"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
UNREADABLE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "the file is empty: it must be a mapping of fields"),
    "a list": ("- 1\n", "the file is a list: it must be a mapping of fields"),
    "two documents": ("a: 1\n---\nb: 2\n", "it is not valid YAML (but found another document in line 2)"),
    "not YAML": (
        "pruning: [\n",
        "it is not valid YAML (expected the node content, but found '<stream end>' in line 2)",
    ),
    "a zero byte": (b"pruning: \x00\n", "it is not YAML (special characters are not allowed)"),
    "not UTF-8": (b"pruning: \xff\xfe\n", "it is not UTF-8 text"),
    "too large": ("#" * 262145, "it is larger than 64 KiB, which no such configuration is"),
    "too deep": ("[" * 5000, "it is nested too deep"),
    "aliases": (BOMB, "the alias in line 2 is refused: write what it stands for in its place"),
    "itself": ("a: &a [*a]\n", "the alias in line 1 is refused: write what it stands for in its place"),
    "twice": ("pruning: 1\npruning: 2\n", "'pruning' occurs twice in the mapping of line 1"),
    "a function": (
        "pruning: 1\nx: !!python/object/apply:os.system ['touch pwned']\n",
        "the tag !!python/object/apply:os.system in line 2 is refused: only !Pruner is read",
    ),
    "another tag": (LISTED.format("[!PrunerV2 {}]"), "the tag !PrunerV2 in line 1 is refused: only !Pruner is read"),
    "a plain type's tag": ("a: !!bool x\n", "the tag !!bool in line 1 is refused: only !Pruner is read"),
    "a tagged word": (
        LISTED.format("[!Pruner word]"),
        "it is not valid YAML (expected a mapping node, but found scalar in line 1)",
    ),
    "no pruning": ("model: {}\n", f"the file has no pruning: {WITHIN}"),
    "no approach": ("pruning: {}\n", f"pruning has no approach: {WITHIN}"),
    "no compression": ("pruning: {approach: {}}\n", f"approach has no weight_compression: {WITHIN}"),
    "no list": (LISTED.format("{}"), "weight_compression has no list of pruners, each a !Pruner"),
    "no pruners": (LISTED.format("[]"), "weight_compression has no list of pruners, each a !Pruner"),
    "no tag": (LISTED.format("[!Pruner {}, {}]"), "pruner 2 is not a !Pruner"),
    "an unknown section": (
        "prunning: {}\n",
        "the file has an unknown field 'prunning'; did you mean 'pruning'?",
    ),
    "an unknown number": ("7: {}\n", "the file has an unknown field 7; did you mean 'version'?"),
    "steps": (
        "pruning: {approach: {weight_compression_pytorch: {pruners: []}}}\n",
        "weight_compression_pytorch is not read: it counts in steps, and only weight_compression counts in epochs",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_refused_files(case: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    content, message = UNREADABLE[case]
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_inc_config(file)
    assert str(error.value) == f"{file}: {message}"
    assert [path.name for path in file.parent.iterdir()] == ["conf.yaml"]  # nothing was run


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "it is not a file"), (tmp_path / "no.yaml", "it cannot be read")):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load_inc_config(path)
        assert str(error.value).startswith(f"{path}: {message}")


def test_loader_is_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others (the ancestor, for one) register with yaml.SafeLoader is not known to ours, nor ours to them."""
    monkeypatch.setattr(yaml.SafeLoader, "yaml_constructors", dict(yaml.SafeLoader.yaml_constructors))
    yaml.SafeLoader.add_constructor("!Other", lambda loader, node: pytest.fail("it was run"))
    file.write_text("a: !Other {}\n")
    with pytest.raises(ValueError, match=r"the tag !Other in line 1 is refused: only !Pruner is read$"):
        load_inc_config(file)
    assert "!Pruner" not in yaml.SafeLoader.yaml_constructors
    assert len(load_inc_config(INC / "weights.yaml").rules) == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_sentence(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = (INC / data.draw(st.sampled_from(["heads_and_neurons.yaml", "without_meaning.yaml"]))).read_text()
    start = data.draw(st.integers(0, len(source)))
    patch = data.draw(st.text(alphabet="ab:0{}[]!&*'\"-#|>%@`,.\n \t?<=~", max_size=6))
    file = tmp_path_factory.mktemp("damaged") / "conf.yaml"
    file.write_text(source[:start] + patch + source[start + data.draw(st.integers(0, 12)) :])
    assert "\n" not in refusal(file)


def refusal(file: Path) -> str:
    """The error's sentence, or none where the damage left a file that can be read."""
    try:
        load_inc_config(file)
    except ValueError as error:
        return str(error)
    return ""


HEAD = "pruning:\n  approach:\n    weight_compression:\n"


@pytest.mark.parametrize(
    "entry",
    [
        "names: ['${oc.env:MY_TOKEN}']",
        'names: ["\\x24{oc.env:MY_TOKEN}"]',
        "names: ['a', 'b.${.include}']",
        "names: ['\\\\${oc.env:MY_TOKEN}']",
        "'${oc.env:MY_TOKEN}': 1",
        "parameters: {target: 1, importance_inputs: ['${oc.env:MY_TOKEN}'], importance_metric: weighted_gradient}",
    ],
)
def test_what_hydra_would_resolve_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setenv("MY_TOKEN", "ENVSECRET")
    file.write_text(f"{HEAD}      pruners:\n        - !Pruner\n            {entry}\n")
    with pytest.raises(ValueError, match=r"\$\{ is refused: Hydra would resolve it"):
        load_inc_config(file)


def test_a_note_stays_one_comment(file: Path) -> None:
    """A value that a note quotes cannot become a line of the configuration."""
    file.write_text(
        f"{HEAD}      target_sparsity: |\n        x\n        evil: {{_target_: os.system}}\n      pruners:\n"
        "        - !Pruner\n            target_sparsity: 0\n            names: ['a']\n"
    )
    text = load_inc_config(file).to_yaml()
    assert "evil" in text
    assert set(yaml.safe_load(text)) == {"defaults", "rules"}
