"""Configurations, tokenizers and networks of the library `transformers` (extra `[hf]`), by folder or name.

Files are data: no code of a checkpoint runs, and weights come from safetensors files only. Errors of the library become
one sentence in a ValueError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gsprune.extras import need
from gsprune.text.display import label, logger
from gsprune.text.names import did_you_mean

__all__ = ["load_config", "load_tokenizer", "make_network", "padding_id", "transformers"]

log = logger(__name__)
LONGEST = 200  # characters of the library's messages in errors


def transformers() -> Any:
    """The module.

    Raises:
        MissingExtraError: it is not installed.
    """
    return need("transformers")


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer in a folder, or with a name on the Hugging Face hub (or in its local cache).

    Raises:
        ValueError: no such folder or name, or no tokenizer in it.
    """
    return _load("dataset.tokenizer", "a tokenizer", transformers().AutoTokenizer.from_pretrained, name)


def padding_id(tokenizer: Any) -> int:
    """The token that pads short texts: the padding token, or the end token if the tokenizer has no padding."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if number is not None:
            return int(number)
    raise ValueError("the tokenizer has neither a padding token nor an end token: give it one")


def load_config(name: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> Any:
    """The configuration of a network, with some of its settings changed.

    Args:
        name: a folder with a `config.json`, or a name on the hub; None: `settings` describe the whole network, its
            kind with `model_type`.

    Raises:
        ValueError: no such folder or name, no `model_type`, or a setting that this kind of network does not have.
    """
    changes, auto = dict(settings), transformers().AutoConfig
    if name is not None:
        config = _load("model.name", "the configuration of a model", auto.from_pretrained, name)
        with _settings_errors():
            _check_settings(config, changes)
            config.update(changes)
        return config
    kind = changes.pop("model_type", None)
    if kind is None:
        raise ValueError(
            "model.name is null: give a folder or a name on the hub, or with model.pretrained=false a model_type in "
            "model.config"
        )
    with _settings_errors():
        _check_settings(auto.for_model(kind), changes)
        return auto.for_model(kind, **changes)


def make_network(kind: str, config: Any, *, name: str | os.PathLike[str] | None) -> nn.Module:
    """A network in float32 with fused attention.

    Args:
        kind: the library's class that chooses by configuration, such as "AutoModelForSequenceClassification".
        name: a folder or a name on the hub with the weights; None: random weights.

    Raises:
        ValueError: no such network for this configuration, no weights, or no weights in safetensors files.
    """
    auto, attention = getattr(transformers(), kind), {"attn_implementation": "sdpa"}
    with _quiet():
        if name is None:
            with _settings_errors():
                return auto.from_config(config, **attention).float()  # type: ignore[no-any-return]
        network, found = _load(
            "model.name",
            "weights in a safetensors file that fit",
            auto.from_pretrained,
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **attention,
        )
    _report(name, network, found)
    return network  # type: ignore[no-any-return]


@contextlib.contextmanager
def _settings_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises its own classes too
        raise ValueError(f"model.config is not allowed: {_sentence(error)}") from error


def _load(setting: str, what: str, load: Callable[..., Any], name: str | os.PathLike[str], **options: Any) -> Any:
    """Call a `from_pretrained`; a name that looks like a path must be a folder, and is not looked up on the hub."""
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or path.is_absolute() or str(name).startswith((".", "~"))):
        raise ValueError(f"{setting}={name} is not a folder")
    source = str(path) if path.is_dir() else str(name)
    try:
        return load(source, trust_remote_code=False, **options)
    except Exception as error:  # safetensors and tokenizers raise their own classes, and Exception itself
        raise ValueError(f"{setting}={name} does not give {what}: {_sentence(error)}") from error


def _check_settings(config: Any, settings: Mapping[str, Any]) -> None:
    known = [*config.to_dict(), *config.attribute_map]
    for key in settings:
        if key not in known:
            raise ValueError(f"a {config.model_type} model has no setting {key}{did_you_mean(key, known)}")


def _report(name: str | os.PathLike[str], network: Any, found: Mapping[str, Any]) -> None:
    """Log the tensors that the checkpoint lacks: a new head is expected, other tensors are worth a warning."""
    fresh = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    body = [key for key in fresh if key.startswith(f"{network.base_model_prefix}.")]
    if body:
        log.warning("%s lacks %d tensors of the network, which start at random, such as %s", name, len(body), body[0])
    if head := [key for key in fresh if key not in body]:
        log.info("%s lacks tensors of the head, which start at random: %s", name, ", ".join(head))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the library's bars and tables, which would disturb the display of a run."""
    settings = transformers().utils.logging
    level, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if bars:
            settings.enable_progress_bar()


def _sentence(error: BaseException) -> str:
    return label(" ".join(str(error).split()) or type(error).__name__, LONGEST)
