"""Several processes train one network: the same masks and weights as one, the data shared out, faults that end it.

What the processes do is in `ranks.py`. Starting two of them takes seconds, so one start serves many tests.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from datetime import timedelta
from functools import partial

import endings
import pytest
import ranks
import torch
import torch.distributed as dist
from facts import needs_cuda_build, refused
from jobs import ROOT, configure, train
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import gsprune
from gsprune import Pruner, collectives
from gsprune.app.job import _run, run
from gsprune.collectives import one_after_the_first
from gsprune.cost.counting import count_macs
from gsprune.criteria import Weighted
from gsprune.files.locks import Lock
from gsprune.formats.masks import load_masks
from gsprune.formats.network import load_pruned, save_pruned
from gsprune.pruner.sharded import _in_order
from gsprune.schedules import Linear
from gsprune.settings.identity import config_hash
from gsprune.tracking.outbox import Outbox
from gsprune.tracking.tracker import read_metrics
from gsprune.training import data_parallel as data_parallel_
from gsprune.training.data_parallel import (
    LocalBatch,
    averaging,
    data_parallel,
    local_batches,
    loss_divisor,
    own_range,
    prepared,
)
from gsprune.training.launcher import Processes, ProcessFailed, launch, taking_part
from gsprune.training.signals import Interrupted
from gsprune.training.trainer import Totals, Trainer

PARTS = (
    ranks.elementwise,
    ranks.accumulated,
    ranks.units,
    ranks.cut,
    ranks.at_random,
    ranks.timed,
    ranks.distilled,
    ranks.told,
    ranks.rested,
    ranks.reductions,
    ranks.buffers,
    ranks.orders,
    ranks.sharded,
    ranks.resumed,
    ranks.not_finite,
    ranks.trained_sharded,
    ranks.refusals,
    ranks.cuts,
    ranks.drifting,
)


@pytest.fixture(scope="module")
def two():
    """What every part returned in process 0 and in process 1."""
    return launch(Processes(2, timeout_minutes=2), "cpu", ranks.everything, *PARTS)


# --- the same as one process -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS[:7])
def test_masks_weights_and_metrics_are_those_of_one_process_on_the_same_global_batches(two, case):
    alone = case()
    assert alone["updates"] == (2 if case is ranks.timed else 5)  # a mask that takes nothing more is no update
    for found in (process[case.__name__] for process in two):
        assert (found["updates"], found["scored"]) == (alone["updates"], alone["scored"])
        assert found["masks"].keys() == alone["masks"].keys()
        assert all(torch.equal(found["masks"][name], mask) for name, mask in alone["masks"].items())
        assert_close(found["weights"], alone["weights"], rtol=1e-10, atol=1e-12)
        assert_close(found["metrics"], alone["metrics"], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_all_processes_have_the_same_weights_to_the_last_bit(two):
    for case in ("elementwise", "accumulated", "units", "cut", "distilled"):
        first, second = (process[case]["weights"] for process in two)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert two[0][case]["metrics"] == two[1][case]["metrics"]


@pytest.mark.slow
def test_gradients_are_averaged_once_a_step_however_many_batches_are_in_it(two):
    assert [process["reductions"] for process in two] == [3, 3]  # 5 batches, 2 to a step


@pytest.mark.slow
def test_batchnorm_statistics_are_the_same_after_an_epoch_and_dropout_differs(two):
    first, second = (process["buffers"] for process in two)
    assert torch.equal(first["mean"], second["mean"])
    assert all(first["drawn"] != second["drawn"])


@pytest.mark.slow
def test_processes_rest_together_while_they_validate_and_go_on_from_there_with_the_same_bits(two):
    """37 samples in batches of 9: of the last one the second process has none."""
    alone = ranks.rested()
    epoch = [*((0, step) for step in (1, 2, 3, 4, 5)), *[(0, 5)] * 5, (1, 0)]
    for found in (alone, *(process["rested"] for process in two)):
        assert found["places"][:11] == epoch
        assert found["metrics"][0] == found["metrics"][1]
        assert all(torch.equal(found["weights"][0][name], tensor) for name, tensor in found["weights"][1].items())
    assert_close(two[0]["rested"]["metrics"][0], alone["metrics"][0], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_processes_whose_group_knows_gpus_only_make_one_for_what_lies_in_the_machines_memory(two):
    assert [process["told"] for process in two] == [
        {"agreed": 1, "gathered": [0, 1], "broadcast": 10, "groups": 1},
        {"agreed": 1, "gathered": [0, 1], "broadcast": 10, "groups": 1},
    ]


@pytest.mark.parametrize(("number", "local", "turn"), [(0, "0", 0), (4, "0", 1), (5, "1", 2)])
def test_the_first_process_goes_first_then_one_on_each_other_machine(monkeypatch, number, local, turn):
    seen = []
    monkeypatch.setattr(collectives, "rank", lambda: number)
    monkeypatch.setattr(collectives, "world_size", lambda: 8)
    monkeypatch.setattr(collectives, "hosts", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda group: seen.append("barrier"))
    monkeypatch.setenv("LOCAL_RANK", local)
    with one_after_the_first():
        seen.append("work")
    assert (len(seen), seen.index("work")) == (3, turn)


def test_on_gpus_one_group_with_one_time_out_sends_by_nccl_and_by_gloo(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: seen.append((backend, timeout)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: seen.append("left"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with taking_part("cuda", timeout_minutes=7):
        pass
    assert seen == [1, ("cpu:gloo,cuda:nccl", timedelta(minutes=7)), "left"]


@needs_cuda_build
def test_what_a_process_tells_of_its_sums_lies_in_the_machines_memory():
    with FakeTensorMode():  # as if there were a GPU
        totals = Totals(torch.device("cuda"))
        assert totals._loss.device.type == "cuda"
        state = totals.state_dict()
    assert [state[name].device.type for name in ("loss", "correct", "left_out")] == ["cpu"] * 3


class NormAndReLU(nn.BatchNorm2d):
    """A norm with an activation in it, as of other libraries."""

    def forward(self, x):
        return super().forward(x).relu()


def small_net(first=nn.BatchNorm2d):
    torch.manual_seed(0)
    conv = partial(nn.Conv2d, kernel_size=3, bias=False)
    body = (conv(1, 8), first(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def synchronised(monkeypatch, model):
    with monkeypatch.context() as patched:
        patched.setattr(data_parallel_, "world_size", lambda: 2)
        return prepared(model, torch.device("cuda"))


def test_on_gpus_batchnorm_is_synchronised_but_for_one_that_does_more(monkeypatch):
    model = small_net(NormAndReLU)
    model.insert(6, model[4])  # in two places
    kept = "NormAndReLU on cuda .* 2 processes"
    with pytest.warns(UserWarning, match=kept):
        model = synchronised(monkeypatch, model)
    assert [type(model[i]).__name__ for i in (1, 4, 6)] == ["NormAndReLU", "SyncBatchNorm", "SyncBatchNorm"]
    assert model[4] is model[6]


@pytest.mark.parametrize("shrink", ["at_end", "each_update"])
def test_a_network_with_synchronised_norms_is_pruned_saved_and_loaded_as_with_plain_ones(monkeypatch, tmp_path, shrink):
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    found = []
    for model in (small_net(), synchronised(monkeypatch, small_net())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        settings = {"target_sparsity": 0.5, "example_input": x[:1], "shrink": shrink, "schedule": Linear(end_epoch=2)}
        pruner = Pruner(model, Weighted(), optimizer=optimizer, steps_per_epoch=2, **settings)
        pruner.attach(optimizer)
        for _ in range(6):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        pruner.finish()
        found.append((pruner.masks(), {name: p.detach() for name, p in model.eval().named_parameters()}, model(x)))
        assert count_macs(model, x[:1]) < count_macs(small_net(), x[:1])
    assert type(model[1]) is nn.SyncBatchNorm
    assert found[0][0]["0"].sum() == 4
    assert_close(found[1], found[0], rtol=0, atol=0)
    save_pruned(tmp_path, model, pruner.plan)
    loaded = load_pruned(tmp_path, small_net()).eval()
    assert type(loaded[1]) is nn.BatchNorm2d
    assert torch.equal(loaded(x), found[0][2])


def flat(lists):
    return [item for one in lists for item in one]


# --- the data ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "ours"])
def test_each_batch_is_that_of_one_process_shared_out(two, kind):
    alone = ranks.orders()
    first, second = (process["orders"][kind] for process in two)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone[kind]
    assert [(len(a), len(b)) for a, b in zip(first, second, strict=True)] == [(2, 2), (2, 2), (2, 1)] * 2


@pytest.mark.slow
def test_a_process_fetches_its_own_samples_only(two):
    assert [process["orders"]["fetched"] for process in two] == [process["orders"]["ours"] for process in two]


@pytest.mark.slow
def test_a_sampler_without_a_generator_gives_one_order_although_random_states_differ(two):
    first, second = (process["orders"]["global"] for process in two)
    for epoch in (slice(0, 3), slice(3, 6)):
        assert sorted(flat(first[epoch] + second[epoch])) == list(range(11))
    assert first[:3] + second[:3] != first[3:] + second[3:]


@pytest.mark.slow
def test_batches_of_other_loaders_are_cut_and_a_process_without_samples_gets_one_that_does_not_count(two):
    first, second = (process["orders"] for process in two)
    assert first["list"] == [[0, 1, 2], [5]] * 2
    assert second["list"] == [[3, 4], [-100]] * 2
    assert second["inputs"] == [[3, 4], [5]]


@pytest.mark.slow
def test_pictures_are_augmented_as_in_one_process(two):
    alone = ranks.orders()["pictures"]
    for whole, *halves in zip(alone, *(process["orders"]["pictures"] for process in two), strict=True):
        assert torch.equal(torch.cat(halves), whole)


def test_parts_are_even_runs():
    assert [list(own_range(3, number, 4)) for number in range(4)] == [[0], [1], [2], []]
    for n in range(9):
        assert flat(own_range(n, number, 4) for number in range(4)) == list(range(n))


def test_in_a_process_that_is_alone_nothing_changes():
    model, batches = nn.Linear(2, 2), [(torch.zeros(3, 2), torch.zeros(3))]
    assert data_parallel(model) is model
    assert list(local_batches(batches, training=True)) == batches
    assert loss_divisor(batches) == 3


def test_a_share_weighs_what_the_whole_batch_does():
    share = LocalBatch.of(torch.zeros(2, 1), torch.zeros(2), whole=5, own=2)
    assert loss_divisor([share, share]) == 10
    assert LocalBatch.of(None, torch.zeros(1, dtype=torch.int64), whole=1, own=0)[1].tolist() == [-100]


# --- FSDP --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(ranks.CASES)), ids=["-".join(map(str, case)) for case in ranks.CASES])
def test_a_sharded_model_gets_the_masks_of_the_model_in_one_piece_at_every_step(two, index):
    criterion, scope, least = ranks.CASES[index]
    alone = ranks.pruned(criterion, scope=scope, min_kept=least, sharded=False)
    assert len({row["report"]["sparsity"] for row in alone}) > 4  # the schedule ran
    for process in two:
        for found, expected in zip(process["sharded"][index], alone, strict=True):
            assert found["report"] == expected["report"]
            for what in ("masks", "scores", "weights", "momenta"):
                for name, tensor in expected[what].items():
                    assert torch.equal(found[what][name], tensor), (what, name)


@pytest.mark.slow
def test_a_sharded_pruner_goes_on_from_a_state_whoever_saved_it(two):
    for process in two:
        for found in process["resumed"]:
            assert found["sparsity"][0] == found["sparsity"][1] > 0
            for other in (*found["masks"][1:], *found["scores"][1:]):
                first = found["masks"][0] if other["a.weight"].dtype == torch.bool else found["scores"][0]
                assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_in_one_process_counts_in_none(two):
    assert [process["not_finite"] for process in two] == [[1, 1], [1, 1]]


@pytest.mark.slow
def test_a_loop_of_ones_own_with_fully_shard_prunes_as_on_one_process(two):
    alone = ranks.trained_sharded()
    for found in (process["trained_sharded"] for process in two):
        assert found["sparsity"] == alone["sparsity"] == pytest.approx(0.7, abs=1 / 324)
        assert all(torch.equal(found["masks"][name], mask) for name, mask in alone["masks"].items())
        assert_close(found["weights"], alone["weights"], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_cut_is_made_by_one_process_and_refused_in_several(two):
    for process in two:
        assert all("one of 2 processes" in process["cuts"][name] for name in ("units", "weights"))
    kept = gsprune.cut(ranks.net(), [ranks.samples().tensors[0]], sparsity=0.5, progress=False).keeps
    assert all(torch.equal(mask, two[0]["cuts"]["kept"][name]) for name, mask in kept.items())
    assert "kept" not in two[1]["cuts"]


@pytest.mark.slow
def test_what_a_sharded_model_cannot_have_is_said_in_one_sentence(two):
    said = two[0]["refusals"]
    rows = "a.weight is cut over several processes, where only single weights are ranked: take pattern 1x1 without "
    assert said == {
        "tiles": f"{rows}per_channel",
        "channels": f"{rows}per_channel",
        "mixed": "0.a.weight is cut over several processes and 1.weight is not: exclude one of them",
    }


def test_keys_order_as_the_floats_do():
    values = torch.tensor([-torch.inf, -3.0, -1e-40, -0.0, 0.0, 1e-40, 2.0, torch.inf])
    keys = _in_order(values).tolist()
    assert keys == sorted(keys)
    assert keys[3] == keys[4]
    assert len(set(keys)) == 7


# --- faults ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_masks_that_differ_stop_the_run_in_each_process_with_the_processes_named(two):
    for process in two:
        for fact in ("masks", "2 processes", "process 1", "process 0"):
            assert fact in process["drifting"]


FAULTS = {
    "killed": (ProcessFailed, "^process 1 was ended by SIGKILL$"),
    "mistake": (ValueError, "^this is the user's mistake, in one sentence$"),
    "error": (ProcessFailed, "^process 1 failed: KeyError: 'what went wrong'$"),
    "stopped": (Interrupted, "^stopped by SIGTERM$"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", *(pytest.param(how, marks=pytest.mark.long) for how in [*FAULTS][1:])])
def test_a_process_that_dies_ends_the_others_with_its_error(tmp_path, how):
    handlers, began = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], time.monotonic()
    kind, sentence = FAULTS[how]
    with pytest.raises(kind, match=sentence) as caught:
        launch(Processes(2, timeout_minutes=5), "cpu", endings.gone, how, str(tmp_path))
    assert time.monotonic() - began < 60
    assert (tmp_path / "left-0").exists()  # it was not just killed, but got to close what it had open
    if how == "error":
        assert 'raise KeyError("what went wrong")' in str(caught.value.__cause__)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_after_the_time_out(tmp_path):
    began = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"^process 0 failed: .*[Tt]imed out"):
        launch(Processes(2, timeout_minutes=0.05), "cpu", endings.gone, "hangs", str(tmp_path))
    assert time.monotonic() - began < 60


def met(rendezvous):
    """Two machines that are to meet there, of which this is one."""
    return launch(Processes(1, 2, rendezvous, timeout_minutes=0.05, name="a job"), "cpu", endings.gone, "", "")


@pytest.mark.long
def test_machines_that_do_not_meet_say_so_in_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        taken.listen()
        with refused(f"trainer.rendezvous={address}", "in use"):
            met(address)
    with refused("2 machines", f"trainer.rendezvous={address}", "0.05 minutes", "trainer.timeout_minutes"):
        met(address)
    with refused("trainer.rendezvous=nowhere.invalid:1", "0.05 minutes"):
        met("nowhere.invalid:1")


def test_a_parameter_without_gradient_is_said_so(monkeypatch):
    class Wrapped(nn.Module):
        pass

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)
    with (
        refused("parameter", "loss"),
        averaging(Wrapped(), last=True),
    ):
        raise RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one.")


WRONG = {
    "devices=0": ({"devices": 0}, ("trainer.devices=0", "1 or more")),
    "nodes": ({"nodes": 2}, ("trainer.rendezvous=null", "host:port", "trainer.nodes")),
    "timeout": ({"timeout_minutes": 0}, ("trainer.timeout_minutes=0", "above 0")),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_outside_their_range_are_one_sentence(case):
    settings, facts = WRONG[case]
    with refused(*facts):
        Trainer(device="cpu", **settings)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with refused("trainer.devices=4", "at most 1"):
        Trainer(device="cuda", devices=4)
    with refused("trainer.device=cuda:0", "auto", "cuda", "cpu"):
        Trainer(device="cuda:0", devices=2)


# --- jobs --------------------------------------------------------------------------------------------------


def finished(folder, *overrides):
    """A job with a network without BatchNorm, whose samples do not see each other."""
    cfg = configure("pruner=elementwise", "dataset.batch_size=250", *overrides)
    cfg.model = {"_target_": "gsprune.zoo.models.lenet_300_100", "image_size": 8, "in_channels": 1, "num_classes": 10}
    with redirect_stdout(io.StringIO()):
        return run(cfg, output_dir=folder)


def test_how_long_to_wait_changes_no_result_but_the_number_of_processes_may():
    base = config_hash(configure())
    assert config_hash(configure("trainer.timeout_minutes=5", "trainer.rendezvous=here:1")) == base
    assert config_hash(configure("trainer.devices=2")) != base


@pytest.mark.slow
def test_a_job_in_two_processes_leaves_what_a_job_in_one_does(tmp_path):
    alone, both = finished(tmp_path / "1"), finished(tmp_path / "2", "trainer.devices=2")
    assert json.loads((tmp_path / "2" / "result.json").read_text()) == both
    for name in ("accuracy", "baseline_accuracy", "val_accuracy", "sparsity", "updates", "params_nonzero", "macs"):
        assert both[name] == alone[name], name
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    names = [sorted(p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("*")) for n in "12"]
    assert names[0] == names[1]
    masks = [load_masks(tmp_path / number / "masks.safetensors") for number in "12"]
    different = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
    assert different <= 4  # float32: a near tie may fall the other way
    rows = [read_metrics(tmp_path / number / "metrics.jsonl") for number in "12"]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]] == [1, 2, 3, 3]
    assert_close(*([row["train/loss"] for row in found[:3]] for found in rows), rtol=1e-4, atol=0)


@pytest.mark.long
def test_a_signal_ends_all_processes_at_a_checkpoint_and_they_go_on_with_the_same_bits(tmp_path):
    """SIGTERM in the middle of an epoch, to the process that has started the others."""
    more = ("model.width=4", "dataset.batch_size=64", "trainer.devices=2", "trainer.prune_epochs=6", "tracking=none")
    arguments = [*(a for a in LENET if "model" not in a and "epochs" not in a and "batch" not in a), *more]
    arguments += ["trainer.dense_epochs=1", "pruner.target_sparsity=0.8"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "hydra.run.dir=stopped"], cwd=tmp_path, env=environment)
    rows = tmp_path / "stopped" / "metrics.jsonl"
    while not rows.is_file() or len(rows.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    result = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("interrupted", "Interrupted: stopped by SIGTERM")
    assert list((tmp_path / "stopped" / "checkpoint").glob("epoch_*"))
    for folder in ("stopped", "whole"):
        done = train(tmp_path, *arguments, f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("stopped", "whole")]
    for name in ("accuracy", "loss", "baseline_loss", "val_accuracy", "sparsity", "updates", "params_nonzero"):
        assert results[0][name] == results[1][name], name
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole")]
    assert [row["step"] for row in logged[0]] == [*range(1, 8), 7]
    assert [row["train/loss"] for row in logged[0][:7]] == [row["train/loss"] for row in logged[1][:7]]


@pytest.mark.long
def test_a_first_process_that_is_killed_leaves_a_record_that_says_so_in_mlflow_too(tmp_path):
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db"
    criterion = ("pruner.criterion._target_=ranks.Killed", "tracking=mlflow", f"tracking.tracking_uri={store}")
    with pytest.raises(ProcessFailed, match=r"^process 0 was ended by SIGKILL$"):
        finished(tmp_path / "out", "trainer.devices=2", *criterion)
    said = "ProcessFailed: process 0 was ended by SIGKILL"
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", said)
    record = json.loads((tmp_path / "out" / "tracking.json").read_text())
    assert (record["status"], record["stopped"]) == ("FAILED", None)
    found = mlflow.MlflowClient(tracking_uri=store).get_run(record["run_id"])
    assert found.info.status == "FAILED"
    assert found.info.end_time > found.info.start_time
    outbox = Outbox(tmp_path / "out")
    outbox.load()
    assert not outbox.lacking


@pytest.mark.slow
def test_a_mistake_in_a_process_comes_out_as_in_one_and_is_on_record(tmp_path):
    with refused("target_sparsity", "1.0", "[0, 1)"):
        finished(tmp_path, "trainer.devices=2", "pruner.target_sparsity=1.0")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["error"]) == (
        "failed",
        "ValueError: target_sparsity is 1.0: it must be in [0, 1)",
    )


LENET = (
    "model=lenet_300_100",
    "pruner=elementwise",
    "dataset.batch_size=256",
    "trainer.device=cpu",
    "trainer.dense_epochs=1",
    "trainer.prune_epochs=2",
    "trainer.latency_repeats=0",
)


@pytest.mark.long
def test_a_sweep_of_jobs_in_two_processes_is_one_run_a_job_and_trains_dense_once(tmp_path):
    more = ("pruner.target_sparsity=0.5,0.8", "trainer.devices=2", "hydra.sweep.dir=sweep")
    done = train(tmp_path, "--multirun", *LENET, *more)
    assert (done.returncode, done.stderr) == (0, "")
    results = [json.loads((tmp_path / "sweep" / job / "result.json").read_text()) for job in "01"]
    assert [result["status"] for result in results] == ["finished"] * 2
    assert [result["sparsity"] for result in results] == [pytest.approx(share, abs=1e-4) for share in (0.5, 0.8)]
    assert [result["dense"]["source"] for result in results] == ["trained", "cache"]
    assert done.stdout.count("dense    epoch   1/3") == 1
    assert done.stdout.count("prune    epoch   3/3") == 2
    check_runs(f"sqlite:///{tmp_path}/mlflow.db", results, parents=1)


def check_runs(store, results, *, parents):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store)
    experiments = [found.experiment_id for found in client.search_experiments()]
    runs = {found.info.run_id: found for found in client.search_runs(experiments)}
    parent = {runs[result["mlflow_run_id"]].data.tags.get("mlflow.parentRunId") for result in results} - {None}
    assert len(parent) == parents
    assert set(runs) == {*parent, *(result["mlflow_run_id"] for result in results)}
    assert {found.info.status for found in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(results[0]["mlflow_run_id"], "val/accuracy")
    assert [metric.step for metric in history] == [1, 2, 3]


def on_two_machines(folder, *arguments, **environment):
    """The same command twice at once in one directory, as on two machines that share it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("trainer.nodes=2", f"trainer.rendezvous=127.0.0.1:{port}", "hydra.run.dir=out")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    settings = {"cwd": folder, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}}
    command = [sys.executable, str(ROOT / "train.py"), *LENET, *where, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **settings, **pipes) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    return [process.returncode for process in both], *zip(*told, strict=True)


def test_a_machine_without_the_checkpoint_says_so(tmp_path, monkeypatch):
    from gsprune.app.stages.checkpoint import JobCheckpoints
    from gsprune.app.stages.context import Context
    from gsprune.app.stages.history import History
    from gsprune.app.stages.setup import set_up

    second = Context(configure(), tmp_path, first=False)
    setup = set_up(second)
    checkpoints = JobCheckpoints(second, setup, History(second, setup))
    monkeypatch.setattr(collectives, "broadcast", lambda value: tmp_path / "checkpoint" / "epoch_0001_step_000000")
    with refused("epoch_0001_step_000000", "machine"):
        checkpoints.find(resume=True)


@pytest.mark.long
def test_two_machines_make_one_run_and_end_with_one_error(tmp_path):
    codes, out, err = on_two_machines(tmp_path)
    assert (codes, err) == ([0, 0], ("", ""))
    assert "".join(out).count("prune    epoch   3/3") == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["sparsity"]) == ("finished", 0.9)
    check_runs(f"sqlite:///{tmp_path}/mlflow.db", [result], parents=0)
    codes, _, err = on_two_machines(
        tmp_path, "pruner.criterion._target_=ranks.Killed", "tracking=none", "trainer.resume=never"
    )
    assert codes == [1, 1]
    for text in err:  # where torch's C++ code may print of a connection that was reset, too
        said = [line for line in text.splitlines() if line.startswith("process ")]
        assert said == ["process 0 was ended by SIGKILL"], text
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "ProcessFailed: process 0 was ended by SIGKILL")


def torchrun(folder, *arguments):
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HYDRA_"))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), "tracking=none", *LENET, *arguments],
        cwd=folder,
        env={**ours, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_works_in_a_fixed_directory(tmp_path):
    done = torchrun(tmp_path, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prune    epoch   3/3") == 1
    assert json.loads((tmp_path / "out" / "result.json").read_text())["status"] == "finished"
    assert "devices: 2" in (tmp_path / "out" / "config.yaml").read_text()


@pytest.mark.long
def test_torchrun_does_not_repeat_a_finished_run(tmp_path):
    assert torchrun(tmp_path, "hydra.run.dir=out").returncode == 0
    again = torchrun(tmp_path, "hydra.run.dir=out")
    assert (again.returncode, again.stdout.count("epoch")) == (0, 0)
    assert again.stdout.count("not run again") == 1


def test_torchrun_needs_a_directory_without_the_time_in_its_name_and_runs_no_sweep(tmp_path, monkeypatch):
    from gsprune.app import processes
    from gsprune.sweeps.sweep_dir import Sweep

    monkeypatch.setattr(processes, "_run_dir", lambda: "outputs/${now:%H-%M-%S}")
    with refused("torchrun", "hydra.run.dir=<directory>"):
        processes.for_torchrun(configure(), None)
    with refused("torchrun", "--multirun trainer.devices"):
        processes.for_torchrun(configure(), Sweep(tmp_path))


def test_machines_are_no_matter_for_a_sweep(tmp_path, monkeypatch):
    from gsprune.app.processes import run_in_processes
    from gsprune.sweeps.sweep_dir import Sweep

    cfg = configure("trainer.devices=2", "trainer.nodes=2", "trainer.rendezvous=here:1")
    with refused("trainer.nodes=2", "sweep"):
        run_in_processes(_run, cfg, tmp_path, Sweep(tmp_path))


def test_a_lock_in_a_process_that_is_alone_is_the_lock_itself(tmp_path):
    from gsprune.collectives import held

    lock, other = Lock(tmp_path / "a.lock"), Lock(tmp_path / "a.lock")
    with held(lock, waiting_for="that does the same"):
        assert other.acquire() is False
    assert other.acquire() is True
    other.release()


def test_pruners_that_prune_nothing_have_masks_that_agree():
    from gsprune.collectives import check_masks

    check_masks(Pruner(nn.Linear(2, 2), rules=[]).masks())
