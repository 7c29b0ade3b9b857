# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The hybrid forward: decode rows, prefill chunks and fine-tune tokens in one pass.

The pass runs transformers' own model code over one packed row of tokens
(``[1, tokens]``, explicit positions); attention and linears are told by shared state
which sequence and which adapter each token belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn, Tensor
from transformers import PreTrainedModel

from mace_ros.execution.attention import AttentionState, Chunk, KVCache, NAME, Row
from mace_ros.execution.lora import BASE_SLOT, replace_linears, TokenAdapters

BLOCK_TOKENS = 16   # tokens per KV block

# The comparison at load with the model's own forward: a sequence of _CHECK_TOKENS of which
# _CHECK_PREFIX come in an earlier pass, under windows of at most _CHECK_WINDOW.
_CHECK_TOKENS, _CHECK_PREFIX, _CHECK_WINDOW = 12, 5, 4


class UnsupportedModel(ValueError):
    """The packed pass can't carry this model; the message names it and says why."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence that a pass computes."""

    tokens: Sequence[int]     # their ids
    position: int             # of the first one in its sequence
    blocks: Sequence[int]     # KV blocks of the sequence, covering these tokens
    slot: int                 # adapter slot
    wants_logits: bool        # of the last token


class HybridModel:
    """A causal language model of transformers, made to run packed rows."""

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int) -> None:
        """
        Convert ``model`` in place.

        Raises :class:`UnsupportedModel`, also if the packed pass or the fine-tune layers
        do not compute what the model's own forward computes on a few random tokens.
        """
        check_supported(model)
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self.dtype = model.dtype
        self.layers = decoder_layers(model)
        self.context_length = context_length(model)
        self.adapters = TokenAdapters()
        self.attention = AttentionState()
        with _short_windows(model, self.context_length):
            ids = _check_tokens(model, self.context_length)
            reference = _own_logits(model, ids)
            inside = set(map(id, self.layers.modules()))
            outside = [m for m in model.modules() if id(m) not in inside]
            self.groups = replace_linears(model, outside, self.adapters)
            model.set_attn_implementation(NAME)
            for module in model.modules():
                if hasattr(module, 'layer_idx'):
                    module.mace_attention = self.attention
            self.skeleton = Skeleton(model, self.layers)
            shapes = self._compare(ids, reference)
        self.attention.cache = KVCache(
            shapes, -(-kv_tokens // BLOCK_TOKENS) * BLOCK_TOKENS, self.dtype, self.device)

    @property
    def kv_blocks(self) -> int:
        """Blocks that the KV cache holds."""
        assert self.attention.cache is not None
        return self.attention.cache.keys[0].shape[0] // BLOCK_TOKENS

    @torch.no_grad()
    def run(self, spans: Sequence[Span], finetune: FinetuneRows | None = None) -> Tensor:
        """
        Compute one packed pass.

        Returns the fp32 logits ``[spans that want them, vocabulary]`` in the order of
        ``spans``. The layer inputs of ``finetune``'s tokens are stored in its buffers.
        """
        decode = [s for s in spans if len(s.tokens) == 1]
        order = decode + [s for s in spans if len(s.tokens) > 1]
        packed = order + (list(finetune.spans) if finetune else [])
        ids: list[int] = []
        positions: list[int] = []
        keep = {}
        for span in packed:
            ids.extend(span.tokens)
            positions.extend(range(span.position, span.position + len(span.tokens)))
            if span.wants_logits:
                keep[id(span)] = len(ids) - 1
        wanted = [keep[id(s)] for s in spans if s.wants_logits]
        self.attention.row = self._row(decode, packed[len(decode):])
        self._choose_adapters(packed, len(ids))
        try:
            with self._saving(finetune, len(ids)):
                output = self.model(
                    input_ids=self._tensor([ids]), position_ids=self._tensor([positions]),
                    use_cache=False, logits_to_keep=self._tensor(wanted))
        finally:
            self._forget()
        logits: Tensor = output.logits[0].float()
        return logits

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _row(self, decode: Sequence[Span], chunks: Sequence[Span]) -> Row:
        """Say where each token's keys and values are written and which ones it sees."""
        row, write = Row(), []
        if decode:
            longest = max(s.position for s in decode) + 1
            slots = np.zeros((len(decode), longest), dtype=np.int64)
            for i, span in enumerate(decode):
                # Masked places are its own, too: 0 * NaN of another sequence would be NaN.
                slots[i] = span.blocks[0] * BLOCK_TOKENS
                slots[i, :span.position + 1] = cache_slots(span.blocks, span.position + 1)
                write.append(slots[i, span.position:span.position + 1])
            row.decode_slots = torch.from_numpy(slots).to(self.device)
            row.decode_lengths = self._tensor([s.position + 1 for s in decode])
        start = len(decode)
        for span in chunks:
            stop = start + len(span.tokens)
            all_slots = cache_slots(span.blocks, span.position + len(span.tokens))
            write.append(all_slots[span.position:])
            row.chunks.append(Chunk(
                start, stop, span.position, torch.from_numpy(all_slots).to(self.device)))
            start = stop
        row.write_slots = torch.from_numpy(np.concatenate(write)).to(self.device)
        return row

    def _choose_adapters(self, packed: Sequence[Span], tokens: int) -> None:
        used = {s.slot for s in packed}
        self.adapters.slot = self.adapters.choice = None
        if len(used) == 1:
            self.adapters.slot = used.pop()
            return
        slots = [s.slot for s in packed for _ in s.tokens]
        groups = next(g for g in self.groups if g.width)
        choice = torch.zeros(tokens, groups.slots_a.shape[0] // groups.width, dtype=self.dtype)
        choice[torch.arange(tokens), torch.tensor(slots)] = 1
        self.adapters.choice = choice.to(self.device)

    @contextmanager
    def _saving(self, finetune: FinetuneRows | None, tokens: int) -> Iterator[None]:
        """While open, keep each layer's input, and the last layer's output, of fine-tune rows."""
        if finetune is None:
            yield
            return
        first = tokens - finetune.tokens

        # Hooks must return None: anything else would replace what the layer gets or gives.
        def save_input(target: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
            target.copy_(args[0][0, first:])

        def save_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            finetune.hidden[-1].copy_(hidden_of(output)[0, first:])

        hooks = [layer.register_forward_pre_hook(partial(save_input, target))
                 for layer, target in zip(self.layers, finetune.hidden, strict=False)]
        hooks.append(self.layers[-1].register_forward_hook(save_output))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def training(self, row: Row) -> Iterator[None]:
        """While open, ``row`` (whole sequences) is computed under the master weights."""
        self.attention.row = row
        self.adapters.training = True
        try:
            yield
        finally:
            self.adapters.training = False
            self._forget()

    def _forget(self) -> None:
        """Let go of the tensors of a pass."""
        self.attention.row = Row()
        self.adapters.choice = None
        for group in self.groups:
            group.forget()

    def _compare(self, samples: list[list[int]],
                 reference: Tensor) -> list[tuple[int, int, int]]:
        """
        Raise :class:`UnsupportedModel` unless the model's own logits come out of every path.

        ``reference`` is ``[samples, tokens, vocabulary]``. Each path must agree on one
        sample: rounding may lead some token to another expert, but not always. Returns the
        layers' KV heads and head sizes.
        """
        kind = self.model.config.model_type
        limit = 1e-3 if self.dtype == torch.float32 else 0.1
        best: list[float] = []
        try:
            shapes = self._kv_shapes()
            self.attention.cache = KVCache(shapes, 2 * BLOCK_TOKENS, self.dtype, self.device)
            for ids, logits in zip(samples, reference, strict=True):
                errors = self._served_errors(ids, logits) + self._trained_errors(ids, logits)
                best = [*map(min, errors, best)] if best else errors
                if max(best) < limit:
                    return shapes
        except (UnsupportedModel, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModel(
                f'{kind}: the packed pass fails with {type(error).__name__}: {error}') from error
        raise UnsupportedModel(
            f'{kind}: the packed pass does not compute its logits: they are off by '
            f'{max(best):.2g} (relative; up to {limit:.2g} could be rounding)')

    def _served_errors(self, ids: list[int], reference: Tensor) -> list[float]:
        """Compare whole and chunked prefill and a decode row of two sequences with ``ids``."""
        last = len(ids) - 1
        prefix = min(_CHECK_PREFIX, last)
        one, two = (0,), (1,)
        first = self.run([Span(ids[:last], 0, one, BASE_SLOT, True),
                          Span(ids[:prefix], 0, two, BASE_SLOT, True)])
        second = self.run([Span(ids[last:], last, one, BASE_SLOT, True),
                           Span(ids[prefix:], prefix, two, BASE_SLOT, True)])
        rows = self._tensor([last - 1, prefix - 1, last, last])
        return _relative_errors(torch.cat([first, second]), reference[rows])

    def _trained_errors(self, ids: list[int], reference: Tensor) -> list[float]:
        """Compare what the layers, called one by one, make of two training sequences."""
        prefix = min(_CHECK_PREFIX, len(ids) - 1)
        row = Row(sequences=(prefix, len(ids)))
        positions = [*range(prefix), *range(len(ids))]
        with torch.no_grad(), self.training(row):
            hidden, calls = self.skeleton.call_layers(
                self._tensor([[*ids[:prefix], *ids]]), self._tensor([positions]))
            exchanged = _sizes(calls)
            for layer, call in zip(self.layers, calls, strict=True):
                hidden = run_layer(layer, hidden, call)
            if _sizes(calls) != exchanged:
                raise UnsupportedModel(
                    f'{self.model.config.model_type}: its layers hand each other more than the '
                    'hidden states, so that none can be trained by itself')
            logits = self.skeleton.logits(hidden[0, [prefix - 1, prefix + len(ids) - 1]])
        return _relative_errors(logits.float(), reference[[prefix - 1, len(ids) - 1]])

    def _kv_shapes(self) -> list[tuple[int, int, int]]:
        """Find each layer's KV heads and head sizes by running one token."""
        kind = self.model.config.model_type
        self.attention.shapes = {}
        self.attention.row = Row(sequences=(1,))
        with torch.no_grad():
            self.model(input_ids=self._tensor([[0]]), position_ids=self._tensor([[0]]),
                       use_cache=False, logits_to_keep=self._tensor([]))
        shapes, self.attention.shapes = self.attention.shapes, None
        self._forget()
        if sorted(shapes) != list(range(len(self.layers))):
            raise UnsupportedModel(
                f'{kind}: only layers {sorted(shapes)} of '
                f'{len(self.layers)} use the attention interface with keys of their own')
        if self.attention.ignored:
            raise UnsupportedModel(
                f'{kind}: its attention needs {", ".join(sorted(self.attention.ignored))}, '
                'which the packed pass does not heed')
        return [shapes[i] for i in range(len(self.layers))]


@dataclass(frozen=True)
class FinetuneRows:
    """Fine-tune tokens that ride in a pass, and where their layer inputs go."""

    spans: Sequence[Span]
    hidden: Sequence[Tensor]    # for each layer's input and the last output: [tokens, width]

    @property
    def tokens(self) -> int:
        """How many tokens ride."""
        return sum(len(s.tokens) for s in self.spans)


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


class Skeleton:
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


def cache_slots(blocks: Sequence[int], tokens: int) -> np.ndarray:
    """Return where the first ``tokens`` tokens of a block table lie, ``[tokens]``."""
    used = np.asarray(blocks[:-(-tokens // BLOCK_TOKENS)], dtype=np.int64)
    return (used[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1)[:tokens]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Find the list of decoder layers."""
    layers = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise UnsupportedModel(f'{model.config.model_type}: its decoder layers could not be found')


def check_supported(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModel` unless every layer is plain attention we can carry."""
    kind = model.config.model_type
    config = model.config.get_text_config()
    if not getattr(model, '_supports_attention_backend', False):
        raise UnsupportedModel(
            f'{kind}: transformers does not run it through its attention interface, '
            'which the packed pass needs')
    odd = {t for t in getattr(config, 'layer_types', None) or ()
           if t not in ('full_attention', 'sliding_attention')}
    if getattr(model, '_is_stateful', False) or odd:
        raise UnsupportedModel(
            f'{kind}: it keeps recurrent or hybrid state ({", ".join(sorted(odd)) or "stateful"}) '
            'which the packed pass does not carry')
    if getattr(model.config, 'is_encoder_decoder', False):
        raise UnsupportedModel(f'{kind}: only decoder-only models can be served')


def context_length(model: PreTrainedModel) -> int:
    """
    Return the longest sequence the model can take.

    RoPE variants that switch their frequencies with the longest position of a batch
    (``longrope``, ``dynamic``) are kept below the switch: beyond it one long request
    would change the others in its row.
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


@contextmanager
def _short_windows(model: PreTrainedModel, context: int) -> Iterator[None]:
    """While open, windows shorter than ``context`` are so short that a few tokens cross them."""
    windows = [(holder, holder.sliding_window)
               for holder in (model.config.get_text_config(), *model.modules())
               if isinstance(getattr(holder, 'sliding_window', None), int)]
    for holder, window in windows:
        if window < context:
            holder.sliding_window = min(window, _CHECK_WINDOW)
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window


def _check_tokens(model: PreTrainedModel, context: int) -> list[list[int]]:
    """Return samples of random token ids, always the same for a vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (1 if model.dtype == torch.float32 else 3, min(_CHECK_TOKENS, context))
    return torch.randint(
        vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()


def _own_logits(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    """Return ``[samples, tokens, vocabulary]`` by transformers' own attention code."""
    model.set_attn_implementation('eager')
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits
    return logits.float()


def _sizes(calls: Sequence[dict[str, Any]]) -> list[int]:
    """Return the sizes of the containers among the arguments, which a layer may fill."""
    return [len(v) for call in calls for v in (*call['args'], *call['kwargs'].values())
            if isinstance(v, MutableMapping | MutableSequence)]


def _relative_errors(ours: Tensor, theirs: Tensor) -> list[float]:
    """Compare row by row, leaving out what is the same for the whole vocabulary."""
    ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
    errors = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-30)
    return errors.nan_to_num(nan=float('inf')).tolist()

