"""MLflow's entry point `mlflow.model_evaluator`: `mlflow.models.evaluate(..., evaluators="gsprune")`.

Where `evaluate` is given no evaluators MLflow asks all that are installed: this one takes part if it is given an
`example_input`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gsprune.cost.counting import count_macs, count_parameters
from gsprune.extras import need
from gsprune.latency import latency_ms
from gsprune.structures.example import Example
from gsprune.structures.matrices import find_matrices
from gsprune.structures.running import to_device_of

__all__ = ["CostEvaluator", "costs"]

if TYPE_CHECKING:
    from mlflow.models.evaluation.base import ModelEvaluator
else:
    ModelEvaluator = need("mlflow.models.evaluation.base").ModelEvaluator


def costs(model: nn.Module, example_input: Example, *, latency: bool = True) -> dict[str, float]:
    """What a network costs.

    Args:
        example_input: a batch; `macs` and `latency_ms` are those of the whole of it.
        latency: whether to measure it, which takes up to 10 s.

    Returns:
        `params`, `params_nonzero`, `sparsity` (the share of zeros in the weights of linear and convolution layers, in
        [0, 1]), `macs` and `latency_ms` (a median over 50 passes).

    >>> layer = nn.Linear(4, 2, bias=False)
    >>> _ = layer.weight.data.fill_(1)[0].fill_(0)
    >>> from torch import ones
    >>> costs(layer, ones(1, 4), latency=False)
    {'params': 8.0, 'params_nonzero': 4.0, 'sparsity': 0.5, 'macs': 8.0}
    """
    weights: dict[int, Tensor] = {id(found.weight): found.weight for found in find_matrices(model)}
    total = sum(weight.numel() for weight in weights.values())
    zeros = total - sum(int(weight.count_nonzero()) for weight in weights.values())
    found = {
        "params": float(count_parameters(model)),
        "params_nonzero": float(sum(int(parameter.count_nonzero()) for parameter in model.parameters())),
        "sparsity": zeros / total if total else 0.0,
        "macs": float(count_macs(model, example_input)),
    }
    if latency:
        found["latency_ms"] = latency_ms({"model": model}, to_device_of(model, example_input))["model"]
    return found


class CostEvaluator(ModelEvaluator):
    """Logs the numbers of `costs` to the run, and to the logged model if MLflow knows which it is.

    `evaluator_config` takes `example_input` (needed: what MACs and milliseconds are of), `model` (a network of torch,
    where MLflow's own model is none of its flavour "pytorch") and `latency=False`. `model_type` may be any text.

    Raises:
        ValueError: there is no network of torch, or no `example_input`.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: Any, evaluator_config: Any, **kwargs: Any) -> bool:
        return (evaluator_config or {}).get("example_input") is not None

    def evaluate(
        self,
        *,
        model_type: Any,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> Any:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.models.evaluation.base import EvaluationResult

        given = dict(evaluator_config or {})
        if given.get("example_input") is None:
            raise ValueError("evaluators='gsprune' needs evaluator_config={'example_input': ...}: a batch of inputs")
        network = _network(given.get("model"), model)
        found = costs(network, given["example_input"], latency=given.get("latency", True))
        now = int(time.time() * 1000)
        numbers = [Metric(key, value, now, 0, model_id=model_id) for key, value in found.items()]
        MlflowClient().log_batch(run_id, numbers)
        return EvaluationResult(metrics=found, artifacts={}, run_id=run_id)  # type: ignore[no-untyped-call]


def _network(given: Any, model: Any) -> nn.Module:
    """The network of torch: as given, else inside MLflow's model."""
    if given is None and model is not None:
        try:
            given = model.get_raw_model()
        except (AttributeError, NotImplementedError):
            given = None
    if not isinstance(given, nn.Module):
        raise ValueError(
            "evaluators='gsprune' needs a network of torch: a model of MLflow's flavour \"pytorch\", or "
            "evaluator_config={'model': network}"
        )
    return given
