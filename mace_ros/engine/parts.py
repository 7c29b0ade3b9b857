# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The parts that an engine is built from."""

from __future__ import annotations

from dataclasses import dataclass

from mace_ros.api.hardware import Hardware
from mace_ros.api.settings import Settings
from mace_ros.engine.measured_device import MeasuredDevice
from mace_ros.engine.paged_kv_cache import PagedKVCache
from mace_ros.engine.router import Router
from mace_ros.learning.live_versions import LiveVersions
from mace_ros.memory.adapter_slots import AdapterSlots
from mace_ros.memory.block_pool import BlockPool
from mace_ros.memory.budget import MB
from mace_ros.model.chat import ChatTokenizer
from mace_ros.model.constraints import ConstraintCompiler
from mace_ros.model.cpu_threads import CpuThreads
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.scheduling.cost_model import CostModel
from mace_ros.scheduling.kv_cache_manager import KVCacheManager
from mace_ros.scheduling.memory_arbiter import MemoryArbiter
from mace_ros.scheduling.plan import State
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.journal_writer import JournalWriter


@dataclass(frozen=True)
class Parts:
    """Everything that holds memory or files, shared by the engine and its learner."""

    model: PackedModel
    model_name: str
    weights_digest: str         # identifies the base model's answers in the journal
    chat: ChatTokenizer
    constraints: ConstraintCompiler
    hardware: Hardware
    free_bytes: float           # beside the base model, when it was loaded
    lora: LoRAManager
    live: LiveVersions          # the live versions and their scopes
    router: Router              # chooses the version that answers a query
    slots: AdapterSlots         # of the device, for the versions that queries need
    state: State                # the scheduler's input
    pool: BlockPool
    kv_cache: KVCacheManager
    memory: MemoryArbiter
    paged: PagedKVCache
    cost: CostModel
    threads: CpuThreads | None  # on a CPU
    measured: MeasuredDevice    # keeps it for the next start
    journal: JournalWriter
    store: AdapterStore

    def close(self) -> None:
        """Keep what was measured for the next start, and wait until the journal is on disk."""
        self.measured.save(self.cost)
        self.journal.close()


def budget_bytes(settings: Settings, free_bytes: float) -> float:
    """Return the memory budget, if ``free_bytes`` were free beside the base model."""
    memory = settings.memory
    return memory.budget_mb * MB if memory.budget_mb else free_bytes - memory.headroom_mb * MB
