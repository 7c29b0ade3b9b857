# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Builds an engine from its settings, in the order in which its parts depend on each other.

First the parts that own the device's memory (:func:`load_parts`), then the objects that use
them (:func:`build_engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
import json
import math
from pathlib import Path
import platform
import time
from typing import TypeAlias

import torch

from mace_ros.api.hardware import Hardware
from mace_ros.api.settings import InvalidSetting, Settings
from mace_ros.engine.engine import Engine
from mace_ros.engine.learner_port import LearnerPort
from mace_ros.engine.measured_device import MeasuredDevice
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.engine.parts import budget_bytes, Parts
from mace_ros.engine.router import Router
from mace_ros.finetune.calibration import measure
from mace_ros.finetune.footprint import measure_footprint
from mace_ros.learning.learner import Learner
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.memory.block_pool import BLOCK_TOKENS, BlockPool
from mace_ros.memory.budget import MB, MemoryBudget
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.constraints import ConstraintCompiler
from mace_ros.model.cpu_decode_check import use_cpu_decode
from mace_ros.model.cpu_threads import CpuThreads
from mace_ros.model.fused_check import use_fused_layers
from mace_ros.model.graph_capture import capture
from mace_ros.model.hardware import (
    free_memory,
    hardware,
    limit_kernel_caches,
    release_memory as release_memory,  # after an engine was closed, or failed to load
)
from mace_ros.model.heap import limit_heap
from mace_ros.model.int4_kernels import find_kernel
from mace_ros.model.int4_limit import with_measured_limit
from mace_ros.model.loading import (
    best_device,
    best_dtype,
    cache_folder,
    load_model,
    LoadedModel,
    Progress,
    reporting,
    weights_digest,
)
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.lora_mapping import BASE_SLOT, FIRST_SERVED_SLOT
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack
from mace_ros.model.paged_check import use_paged_attention
from mace_ros.model.token_ranks import token_ranks
from mace_ros.model.vocabulary import Vocabulary
from mace_ros.scheduling.cost_model import CALIBRATION_S, CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import SegmentKind
from mace_ros.store.adapter_store import AdapterStore, check_same_model
from mace_ros.store.journal_writer import JournalWriter
from mace_ros.store.layout import JOURNAL, model_note
from mace_ros.telemetry.device_counters import DeviceCounters

CUDA_KV_SHARE = 0.5        # largest share of the budget for a KV cache that can't shrink
REFRESH_S = 1.0            # longest measurement of a device that another start has measured
CAPTURE_S = 45.0           # longest time for graph capture; the rest runs eagerly
MAX_STEP_TOKENS = 4096     # of a fine-tune step, however fast the device


def build_engine(settings: Settings, *, storage: Path | None = None,
                 wake: Callable[[], None] | None = None, progress: Progress | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 make_learner: MakeLearner | None = None) -> Engine:
    """
    Load the model, and serve the adapter versions that are live in the journal.

    ``storage`` defaults to the setting. ``wake`` is called, on any thread, when the engine has
    something to do; ``progress`` receives a line for each phase of a long start. Raises
    ``ModelNotFound``, ``UnsupportedModel``, ``InvalidSetting``, ``JournalError``,
    ``StorageInUse``, ``OtherModel`` or ``OtherAdapter``, and ``ValueError`` if
    ``adapter.target_modules`` selects no layer.
    """
    folder = storage or Path(settings.storage.folder).expanduser()
    wake, progress = wake or _ignore_wake, progress or _ignore_progress
    # First, so that a folder in use by another node is found out before the model is loaded.
    journal = JournalWriter(folder / JOURNAL, max_answers=settings.storage.max_answers)
    try:
        parts = load_parts(settings, folder, journal, progress, clock)
        learner = (make_learner or default_learner)(parts, settings, wake, clock)
        return Engine(settings, parts, learner, wake=wake, clock=clock)
    except BaseException:
        journal.close()
        raise


def load_parts(settings: Settings, folder: Path, journal: JournalWriter, progress: Progress,
               clock: Callable[[], float]) -> Parts:
    """Load the model, divide the memory, and measure the device."""
    device = _load_model(settings, progress)
    loaded, model = device.loaded, device.model
    adapter = settings.adapter
    chat = ChatTokenizer(loaded.tokenizer, loaded.model.generation_config.eos_token_id)
    if not chat.invocation:
        progress('the chat template has no recognisable user turn: adapters act on whole prompts')
    slots = AdapterSlots(base_slot=BASE_SLOT, first=FIRST_SERVED_SLOT, count=adapter.slots)
    live = LiveVersions(token_ranks(loaded.tokenizer).frequency)
    lora = LoRAManager(
        model.linears, targets=adapter.target_modules, rank=adapter.rank, alpha=adapter.alpha,
        slots=adapter.slots, protected_directions=settings.finetune.spared_directions,
        invocation=chat.invocation)
    if model.device.type == 'cuda':
        device = replace(device, free_bytes=free_beside(model, lora, device.hardware))
    _use_fast_kernels(model, progress)
    pool = BlockPool(model.kv_blocks, BLOCK_TOKENS)
    kv_cache = KVCacheManager(pool, sharing=settings.memory.prefix_sharing)
    memory = _divide_memory(settings, model, lora, device.free_bytes, kv_cache)
    config = loaded.model.config.get_text_config()
    check_same_model(folder, model_note(
        config.model_type, layers=config.num_hidden_layers, width=config.hidden_size,
        vocabulary=config.vocab_size))
    longest = min(model.context_length, memory.max_request_tokens)
    memory.charge_graphs(_capture_graphs(
        settings, device, longest, memory.budget.total - memory.budget.minimum, progress, clock))
    measured = MeasuredDevice(
        cache_folder(settings.storage.model_cache), _identity(settings, device, lora))
    if device.threads:      # after what is sized for the highest number of threads
        device.threads.adapt()
    cost = _calibrate(settings, model, lora, measured, progress, clock)
    return Parts(
        model=model, model_name=loaded.name, weights_digest=weights_digest(loaded.model),
        chat=chat, constraints=ConstraintCompiler(Vocabulary(
            loaded.tokenizer, chat.end_tokens, config.vocab_size)),
        hardware=device.hardware, free_bytes=device.free_bytes, lora=lora,
        live=live, router=Router(live), slots=slots,
        state=kv_cache.state, pool=pool, kv_cache=kv_cache, memory=memory,
        paged=PagedKVCache(model, pool, kv_cache, settings.memory.kv_prune), cost=cost,
        threads=device.threads, measured=measured, journal=journal, store=AdapterStore(folder))


class EngineStepCost:
    """The cost of fine-tune steps, from the cost model and the free memory."""

    def __init__(self, cost: CostModel, memory: MemoryArbiter, layers: int) -> None:
        """``layers`` is the model's number of decoder layers."""
        self._cost, self._memory, self._layers = cost, memory, layers

    def tokens_within(self, seconds: float) -> int:
        """Return the tokens of a step whose segments take up to ``seconds`` and which fits now."""
        return self._memory.step_tokens(self._cost.tokens_within(
            SegmentKind.BACKWARD_RECOMPUTED, seconds, most=MAX_STEP_TOKENS))

    def step_s(self, tokens: int) -> float:
        """Return the device seconds of a step over ``tokens`` tokens."""
        return self._layers * (self._cost.segment_s(SegmentKind.FORWARD, tokens)
                               + self._cost.segment_s(SegmentKind.BACKWARD, tokens))


MakeLearner: TypeAlias = Callable[
    [Parts, Settings, Callable[[], None], Callable[[], float]], LearnerPort]


def default_learner(parts: Parts, settings: Settings, wake: Callable[[], None],
                    clock: Callable[[], float]) -> Learner:
    """Return the learner that ``build_engine`` uses unless another one is given."""
    return Learner(
        model=parts.model, model_name=parts.model_name, lora=parts.lora, chat=parts.chat,
        live=parts.live, journal=parts.journal, store=parts.store,
        cost=EngineStepCost(parts.cost, parts.memory, len(parts.model.layers)),
        settings=settings, wake=wake, clock=clock)


# -- the device --------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadedDevice:
    """A model on its device; ``free_bytes`` are free beside it (on CUDA an estimate so far)."""

    loaded: LoadedModel
    model: PackedModel
    hardware: Hardware
    free_bytes: float
    threads: CpuThreads | None


def best_weight_dtype(device: str) -> str:
    """Return the dtype that ``model.weight_dtype: auto`` selects on this device."""
    # On ARM, 8 bits are the fastest. On x86, bfloat16 is as fast (PrepackedWeight), and a CPU
    # without bfloat16 has no fast product of float32 with 8 bits (multiplies_int8).
    arm = device == 'cpu' and platform.machine() == 'aarch64'
    return 'int8' if arm else best_dtype(device)


def _load_model(settings: Settings, progress: Progress) -> _LoadedDevice:
    model = settings.model
    device = best_device() if model.device == 'auto' else model.device
    threads = None
    # auto is never int4, which decodes faster, but prefills and learns more slowly.
    dtype = best_weight_dtype(device) if model.weight_dtype == 'auto' else model.weight_dtype
    if dtype == 'int8' and device != 'cpu':
        raise InvalidSetting(f'model.weight_dtype: int8 is for CPUs only, not for {device}')
    if device == 'cpu':
        threads = CpuThreads(model.threads)
        limit_kernel_caches()
        limit_heap()
    loaded = load_model(
        model.source, device=device, dtype='auto' if dtype in ('int8', 'int4') else dtype,
        cache=settings.storage.model_cache, progress=progress,
        int4=with_measured_limit(
            find_kernel(torch.device(device), getattr(torch, best_dtype(device))))
        if dtype == 'int4' else None)
    kind = hardware(loaded.model.device)
    counters = DeviceCounters(kind)
    free = free_memory(loaded.model.device, counters.read().memory_free_mb)
    # The self-check needs dequantised weights, which are freed after it.
    free += sum(w.out_features * w.in_features for w in loaded.int4.values()
                ) * loaded.model.dtype.itemsize
    # On a CPU the KV cache takes memory as it fills, and returns it.
    kv_bytes = budget_bytes(settings, free) * CUDA_KV_SHARE if device == 'cuda' else math.inf
    if dtype == 'int8':
        progress('rounding its linear layers to 8 bits')
    packed = pack(loaded.model, kv_tokens=settings.memory.kv_cache_tokens, kv_bytes=kv_bytes,
                  int8=dtype == 'int8', int4=loaded.int4)
    if reason := use_paged_attention(packed):
        progress(f'no paged attention, so decoding copies keys and values: {reason}')
    if device == 'cpu':     # without the memory of the 8-bit weights
        free = free_memory(packed.device, counters.read().memory_free_mb)
    return _LoadedDevice(loaded, packed, kind, free, threads)


def free_beside(model: PackedModel, lora: LoRAManager, kind: Hardware) -> float:
    """
    Return the bytes of a GPU that are free beside the base model.

    The KV cache and the adapters exist, but belong to the budget. Gaps between weights, which
    converting the layers has left, do not: they can't be returned to the device.
    """
    torch.cuda.empty_cache()
    free = free_memory(model.device, DeviceCounters(kind).read().memory_free_mb)
    return free + model.kv_cache.nbytes + lora.nbytes


def _divide_memory(settings: Settings, model: PackedModel, lora: LoRAManager, free_bytes: float,
                   kv_cache: KVCacheManager) -> MemoryArbiter:
    """
    Return the arbiter of the memory budget.

    Raises :class:`InvalidSetting` if the budget has no room for a single short answer.
    """
    budget = MemoryBudget(
        measure_footprint(model, lora), budget_bytes(settings, free_bytes),
        max_blocks=model.kv_blocks, pass_tokens=settings.scheduler.max_batch_tokens,
        rows=settings.scheduler.max_requests,
        # Device graphs hold the addresses of a cache that exists from the start.
        resident=model.device.type == 'cuda')
    memory = MemoryArbiter(budget, kv_cache)
    if budget.total < budget.minimum:
        raise InvalidSetting(
            f'memory.budget_mb: {budget.total / MB:.0f} MB beside the base model, but '
            f'{budget.minimum / MB:.0f} MB are needed; lower adapter.slots, adapter.rank or '
            'scheduler.max_batch_tokens, or memory.headroom_mb if memory.budget_mb is 0')
    return memory


def has_graphs(model: PackedModel) -> bool:
    """Return whether the model's device can capture graphs."""
    return model.device.type == 'cuda'


def _capture_graphs(settings: Settings, device: _LoadedDevice, max_context: int, room: float,
                    progress: Progress, clock: Callable[[], float]) -> int:
    """Capture device graphs in ``room`` bytes, if there are any on this device; return theirs."""
    model = device.model
    if not (has_graphs(model) and settings.model.device_graphs):
        return 0
    counters = DeviceCounters(device.hardware)
    with reporting(progress, 'capturing device graphs'):
        began = clock()
        captured = capture(
            model, max_rows=settings.scheduler.max_requests,
            max_tokens=settings.scheduler.max_batch_tokens, max_context=max_context,
            keeps_graphs=settings.finetune.recompute != 'always', room=room,
            time_left=lambda: 1.0 - (clock() - began) / CAPTURE_S,
            free_bytes=lambda: free_memory(model.device, counters.read().memory_free_mb))
    progress(str(captured))
    return captured.nbytes + captured.driver_bytes


def _identity(settings: Settings, device: _LoadedDevice, lora: LoRAManager) -> str:
    """Return all that the times of passes and segments depend on."""
    model, config, kind = device.model, device.loaded.model.config, device.hardware.kind
    kernels = (model.fast_passes is not None, model.context.paged is not None,
               *(part.name for part in model.fused_parts))
    cpu = (torch.get_num_threads(), torch.cpu.get_capabilities()) if kind == 'cpu' else ()
    return json.dumps([
        kind, device.hardware.name, *kernels, *cpu, torch.__version__, config.to_dict(),
        str(model.dtype), model.weight_dtype, model.kv_blocks, settings.model.device_graphs,
        settings.scheduler.max_batch_tokens, [list(p.shape) for p in lora.parameters()],
    ], default=str)


def _use_fast_kernels(model: PackedModel, progress: Progress) -> None:
    """Let passes and steps take fewer kernels than the model's own code, where a check allows."""
    if model.device.type == 'cpu':
        with reporting(progress, 'compiling passes of decode rows'):
            reason = use_cpu_decode(model)
        if reason:
            progress(f'passes of decode rows are not compiled: {reason}')
    with reporting(progress, 'compiling parts of layers'):
        reasons = use_fused_layers(model)
    for reason in reasons:
        progress(f'layers take more kernels than they need: {reason}')


def _calibrate(settings: Settings, model: PackedModel, lora: LoRAManager,
               measured: MeasuredDevice, progress: Progress,
               clock: Callable[[], float]) -> CostModel:
    """Measure the device, more briefly if another start has measured it."""
    known = measured.load()
    cost, limit_s = (CostModel(), CALIBRATION_S) if known is None else (
        known, min(REFRESH_S, CALIBRATION_S))
    with reporting(progress, 'measuring the device'):
        end = clock() + limit_s
        cost.calibrate(takewhile(lambda _: clock() < end, measure(
            model, lora, max_tokens=settings.scheduler.max_batch_tokens, clock=clock)))
    model.drop_blocks(0)       # the contents that the measurement has left
    measured.save(cost)
    return cost


def _ignore_wake() -> None:
    """Wake nothing: the caller steps the engine by itself."""


def _ignore_progress(text: str) -> None:
    """Report nothing."""
