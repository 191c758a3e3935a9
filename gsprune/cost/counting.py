"""What a model costs: parameters, multiply-accumulates, bytes. Milliseconds are in latency.py.

No model is changed; training modes are restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop
from torch.utils.hooks import RemovableHandle

from gsprune.structures.attention import no_fast_path
from gsprune.structures.example import call
from gsprune.structures.matrices import LAYERS, is_conv1d
from gsprune.structures.running import evaluating, hooked, to_device_of


def named_layers(model: nn.Module) -> dict[str, Any]:
    """The linear and convolution layers, whose MACs go with the elements of their weight."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LAYERS) or is_conv1d(m)}


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once, pruned weights (stored zeros) included.

    >>> count_parameters(torch.nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def file_bytes(model: nn.Module) -> int:
    """Bytes of the model's state as a safetensors file (header included, tied tensors once)."""
    from safetensors.torch import save

    from gsprune.formats.tensors import state_tensors

    return len(save(state_tensors(model)[0]))


def count_macs(model: nn.Module, example_input: Any) -> int:
    """Multiply-accumulates of one forward pass in eval mode, for the whole of `example_input`.

    Counted by torch's FlopCounterMode / 2: matrix products, convolutions, attention (both products, the full
    square also when causal). Not counted, as is usual: biases, activations, normalisation, pooling,
    element-wise work, recurrent layers' fused kernels. Zeros inside dense tensors do count: only a smaller
    model has fewer. `example_input` is a tensor, a tuple of positional or a dict of keyword arguments; a batch of
    one gives MACs per sample.

    >>> count_macs(torch.nn.Linear(4, 3), torch.ones(2, 4))
    24
    """
    return count_macs_by_module(model, example_input)[""]


def count_macs_by_module(model: nn.Module, example_input: Any) -> dict[str, int]:
    """The same count for each module by its name in `named_modules()`, the modules inside it included ("" is all).

    A module called several times counts every time; one whose forward pass never runs is left out (as the output
    projection of an `nn.MultiheadAttention`, which reads its weight past it).

    >>> count_macs_by_module(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(2, 4))
    {'0': 24, '1': 0, '': 24}
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model would be counted as nothing
    counter = FlopCounterMode(display=False, custom_mapping=_extra_formulas())
    found: dict[str, int] = {}
    begun: list[int] = []

    def end(name: str) -> None:
        found[name] = found.get(name, 0) + (counter.get_total_flops() - begun.pop()) // 2

    def hooks() -> Iterator[RemovableHandle]:
        for name, module in model.named_modules():
            yield module.register_forward_pre_hook(lambda *_: begun.append(counter.get_total_flops()))
            yield module.register_forward_hook(lambda *_, name=name: end(name))

    # plain matrix products: the fused kernels and the encoder layer's fast path are opaque to the counter
    with evaluating([model]), torch.no_grad(), no_fast_path(), sdpa_kernel(SDPBackend.MATH), hooked(hooks()), counter:
        call(model, to_device_of(model, example_input))
    return found


def _extra_formulas() -> dict[Any, Any]:
    """Formulas for kernels that torch's registry lacks, attentions and experts, where this torch has the kernels."""
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_mps")
    experts = (
        getattr(torch.ops.aten, "_grouped_mm", None),
        getattr(torch.ops.transformers, "grouped_mm_fallback", None),
    )
    known = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    return dict.fromkeys(known, sdpa_flop) | {kernel: _grouped_flop for kernel in experts if kernel is not None}


def _grouped_flop(rows: Any, matrices: Any, *args: Any, **kwargs: Any) -> int:
    """Of rows (s, k), each multiplied by one of the matrices (e, k, n).

    >>> _grouped_flop((5, 2), (4, 2, 3))
    60
    """
    several = rows[0] if len(rows) == len(matrices) == 3 else 1
    return int(2 * several * rows[-2] * rows[-1] * matrices[-1])
