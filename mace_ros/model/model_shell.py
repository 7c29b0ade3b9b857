# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A model's code around its decoder layers, and calls of single layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn, Tensor
from transformers import PreTrainedModel


class _RecordingLayer(nn.Module):
    """Takes the place of a decoder layer; records its arguments and returns its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]   # in a list, so that it is not registered as a submodule
        self.hidden: Tensor | None = None
        self.inject: Tensor | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__['_layer'][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden, args, kwargs
        return hidden if self.inject is None else self.inject


class ModelShell:
    """
    A model without its decoder layers: the same embedding, rotary and head code.

    It returns the arguments that each layer is called with, and computes logits from the last
    hidden states. Every scaling and softcap of a model family is thus the model's own.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._recorders = [_RecordingLayer(x) for x in layers]
        self._model = _with_replaced(model, layers, nn.ModuleList(self._recorders))

    def call_layers(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input ``[1, tokens, width]``, and each layer's arguments."""
        none = ids.new_zeros(0)
        self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=none)
        calls = [{'args': r.args, 'kwargs': r.kwargs} for r in self._recorders]
        first = self._recorders[0].hidden
        self._clear()
        return first, calls  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[tokens, vocabulary]`` of the last layer's output ``[tokens, width]``."""
        last = self._recorders[-1]
        last.inject = hidden[None]
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        try:
            logits: Tensor = self._model(
                input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
        finally:
            self._clear()
        return logits.squeeze(0)    # whose gradient is a view, unlike that of an index

    def _clear(self) -> None:
        for recorder in self._recorders:
            recorder.hidden = recorder.inject = None
            recorder.args, recorder.kwargs = (), {}


def _with_replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> Any:
    """Return a shallow copy of ``module`` with the submodule ``old`` replaced by ``new``."""
    if module is old:
        return new
    if not any(m is old for m in module.modules()):
        return module
    result = copy.copy(module)
    result._modules = {
        name: None if child is None else _with_replaced(child, old, new)
        for name, child in module._modules.items()}
    return result


def run_layer(layer: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    """Return the output of a decoder layer, called with arguments from ``call_layers``."""
    return hidden_of(layer(hidden, *call['args'], **call['kwargs']))


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a decoder layer's output; some layers return a tuple."""
    return output[0] if isinstance(output, tuple) else output
