"""An MLflow in memory, that stands in for `mlflow.MlflowClient` and the server behind it and fails on demand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class Memory:
    """The store. The call number `dies_at` fails: after it has done its work, or before, if not `arrives`."""

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.experiments: dict[str, SimpleNamespace] = {}
        self.models: dict[str, SimpleNamespace] = {}
        self.uris: list[str] = []
        self.calls: list[str] = []
        self.dies_at: int | None = None
        self.arrives = True
        self.fault: type[BaseException] = TimeoutError

    def client(self, tracking_uri: str) -> Client:
        self.uris.append(tracking_uri)
        return Client(self)

    def call(self, name: str) -> int:
        self.calls.append(name)
        return len(self.calls) - 1

    def die(self, number: int, *, arrived: bool | None = None) -> None:
        if number == self.dies_at and arrived in (None, self.arrives):
            raise self.fault("no answer")


class Client:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            memory = self._memory
            number = memory.call(name)
            memory.die(number, arrived=False)
            answer = found(*args, **kwargs)
            memory.die(number, arrived=True)
            return answer

        return call

    def get_experiment_by_name(self, name: str) -> Any:
        return self._memory.experiments.get(name)

    def create_experiment(self, name: str, artifact_location: str | None, tags: dict[str, str]) -> str:
        number = str(len(self._memory.experiments))
        made = SimpleNamespace(experiment_id=number, lifecycle_stage="active", tags=dict(tags))
        self._memory.experiments[name] = made
        return str(made.experiment_id)

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        next(e for e in self._memory.experiments.values() if e.experiment_id == experiment_id).tags[key] = value

    def create_run(self, experiment_id: str, start_time: int, run_name: str | None, tags: dict[str, str]) -> Any:
        run_id, stage = f"{len(self._memory.runs):032x}", "active"
        info = SimpleNamespace(
            run_id=run_id, experiment_id=experiment_id, status="RUNNING", lifecycle_stage=stage,
            start_time=start_time, end_time=None, run_name=run_name,
        )  # fmt: skip
        run = SimpleNamespace(
            info=info, name=run_name, params={}, tags=dict(tags), metrics=[], files=[], outputs=[], datasets=set()
        )
        self._memory.runs[run_id] = run
        return self._shown(run)

    def get_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

        if run_id not in self._memory.runs:
            raise MlflowException(f"no run {run_id}", RESOURCE_DOES_NOT_EXIST)
        return self._shown(self._memory.runs[run_id])

    def search_runs(self, experiment_ids: Sequence[str], filter_string: str, **_: Any) -> list[Any]:
        wanted = re.findall(r"(tags|attributes)\.`?([\w.]+)`? = '(.*?)'", filter_string)
        return [
            self._shown(run)
            for run in self._memory.runs.values()
            if run.info.experiment_id in experiment_ids
            and all((run.tags if kind == "tags" else vars(run.info)).get(key) == value for kind, key, value in wanted)
        ]

    def update_run(self, run_id: str, status: str, name: str | None) -> None:
        self._memory.runs[run_id].info.status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        run = self._memory.runs[run_id]
        assert not run.params.keys() & {param.key for param in params}  # they cannot change
        run.params |= {param.key: param.value for param in params}
        run.tags |= {tag.key: tag.value for tag in tags}
        for index, metric in enumerate(metrics):
            run.metrics.append(metric)
            if index == 3:  # a batch may arrive in part
                self._memory.die(self._memory.call("part of log_batch"))

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        run, name = self._memory.runs[run_id], Path(folder or "", Path(path).name).as_posix()
        run.files = sorted({*run.files, name})

    def log_image(self, run_id: str, picture: Any, *, key: str, step: int, timestamp: int, synchronous: bool) -> None:
        run = self._memory.runs[run_id]
        stem = f"images/{key}+step+{step}+timestamp+{timestamp}+{len(run.files)}"
        run.files += [f"{stem}.png"]
        self._memory.die(self._memory.call("half of log_image"))
        run.files += [f"{stem}+compressed.webp"]

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        return [SimpleNamespace(path=name) for name in self._memory.runs[run_id].files if name.startswith(f"{path}/")]

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self._memory.runs[run_id].metrics if metric.key == key]

    def create_logged_model(self, experiment_id: str, *, name: str, source_run_id: str, params: dict[str, str]) -> Any:
        models = self._memory.models
        made = SimpleNamespace(
            model_id=f"m-{len(models)}",
            name=name,
            source_run_id=source_run_id,
            params=params,
            status="PENDING",
            files=[],
        )
        models[made.model_id] = made
        return made

    def search_logged_models(self, experiment_ids: Sequence[str], filter_string: str) -> list[Any]:
        wanted = dict(re.findall(r"(\w+) = '(.*?)'", filter_string))
        return [model for model in self._memory.models.values() if wanted.items() <= vars(model).items()]

    def log_model_artifact(self, model_id: str, path: str) -> None:
        model = self._memory.models[model_id]
        model.files = sorted({*model.files, Path(path).name})

    def log_outputs(self, run_id: str, models: Any) -> None:
        self._memory.runs[run_id].outputs += [model.model_id for model in models]

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        self._memory.runs[run_id].datasets |= {(given.dataset.name, given.dataset.digest) for given in datasets}

    def finalize_logged_model(self, model_id: str, status: str) -> None:
        self._memory.models[model_id].status = status

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        info = self._memory.runs[run_id].info
        info.status, info.end_time = status, end_time

    def _shown(self, run: SimpleNamespace) -> Any:
        last: dict[str, Any] = {}
        for metric in run.metrics:
            if metric.key not in last or metric.step >= last[metric.key].step:
                last[metric.key] = metric
        proto = SimpleNamespace(metrics=list(last.values()))
        data = SimpleNamespace(params=dict(run.params), tags=dict(run.tags), to_proto=lambda: proto)
        outputs = SimpleNamespace(model_outputs=[SimpleNamespace(model_id=name) for name in run.outputs])
        return SimpleNamespace(info=run.info, data=data, outputs=outputs)
