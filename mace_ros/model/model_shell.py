# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A model's code around its decoder layers, and the layers one by one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn, Tensor
from transformers import PreTrainedModel


class _RecordingLayer(nn.Module):
    """Stands in for a decoder layer: notes how it is called and changes nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]   # in a list, so that it isn't registered as a child
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
    The model without its layers: the same embedding, rotary and head code.

    It tells how each layer is called for given tokens, and turns given final hidden
    states into logits; so every scaling and softcap of a family is the model's own.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._recorders = [_RecordingLayer(x) for x in layers]
        self._model = _with_replaced(model, layers, nn.ModuleList(self._recorders))

    def call_layers(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input ``[1, tokens, width]`` and each layer's arguments."""
        none = ids.new_zeros(0)
        self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=none)
        calls = [{'args': r.args, 'kwargs': r.kwargs} for r in self._recorders]
        first = self._recorders[0].hidden
        self._forget()
        return first, calls  # type: ignore[return-value]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[tokens, vocabulary]`` for the last layer's output ``[tokens, width]``."""
        last = self._recorders[-1]
        last.inject = hidden[None]
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        try:
            result: Tensor = self._model(
                input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False).logits[0]
        finally:
            self._forget()
        return result

    def _forget(self) -> None:
        for recorder in self._recorders:
            recorder.hidden = recorder.inject = None
            recorder.args, recorder.kwargs = (), {}


def _with_replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> Any:
    """Return a shallow copy of ``module`` in which the child ``old``, however deep, is ``new``."""
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
    """Return the output of a decoder layer called as the model would call it."""
    return hidden_of(layer(hidden, *call['args'], **call['kwargs']))


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output (some return a tuple)."""
    return output[0] if isinstance(output, tuple) else output
