# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Supported model architectures, and the longest sequence of a model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


class UnsupportedModel(ValueError):
    """Packed passes do not support this model; the message names it and says why."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers; raises :class:`UnsupportedModel` if they are not found."""
    layers = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise UnsupportedModel(f'{model.config.model_type}: its decoder layers were not found')


def check_supported(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModel` unless all layers use full or sliding-window attention."""
    kind = model.config.model_type
    config = model.config.get_text_config()
    if not getattr(model, '_supports_attention_backend', False):
        raise UnsupportedModel(
            f'{kind}: transformers does not run it through its attention interface, '
            'which packed passes need')
    odd = {t for t in getattr(config, 'layer_types', None) or ()
           if t not in ('full_attention', 'sliding_attention')}
    if getattr(model, '_is_stateful', False) or odd:
        raise UnsupportedModel(
            f'{kind}: it keeps recurrent or hybrid state ({", ".join(sorted(odd)) or "stateful"}) '
            'which packed passes do not support')
    if getattr(model.config, 'is_encoder_decoder', False):
        raise UnsupportedModel(f'{kind}: only decoder-only models are supported')


def longest_window(model: PreTrainedModel, context: int) -> int:
    """Return the longest attention window shorter than ``context`` in tokens; 0 if none."""
    holders = (model.config.get_text_config(), *model.modules())
    windows = [getattr(holder, 'sliding_window', None) for holder in holders]
    return max((w for w in windows if isinstance(w, int) and w < context), default=0)


def context_length(model: PreTrainedModel) -> int:
    """
    Return the longest sequence that the model supports, in tokens.

    RoPE variants whose frequencies depend on the largest position of a batch (``longrope``,
    ``dynamic``) are limited to the original context: beyond it, one long request would change
    the output of all others in its pass.
    """
    config = model.config.get_text_config()
    longest = int(config.max_position_embeddings)
    rope = getattr(config, 'rope_parameters', None) or {}
    for entry in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if entry.get('rope_type') in ('longrope', 'dynamic'):
            original = entry.get('original_max_position_embeddings') or getattr(
                config, 'original_max_position_embeddings', None)
            longest = min(longest, int(original or longest))
    return longest
