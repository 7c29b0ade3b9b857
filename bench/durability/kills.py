# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Kills a node again and again, and inspects its storage folder after each kill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
import random
import sys
import time
from typing import Any

from bench.durability.node_run import NodeRun, Promises, RUN_S
from bench.durability.storage import (
    inspect_storage,
    lost_corrections,
    outdated_profiles,
    StorageSnapshot,
)
from mace_ros.store.layout import JOURNAL

# What the kills aim at, in turn.
AIMS = ('any', 'saving', 'intake', 'recording', 'training', 'publishing', 'any', 'starting')
ROUNDS = 50
# Parameters with which a model of random weights is ready, and learns, within seconds. With
# fewer adapted layers a random model would learn little.
PARAMETERS: dict[str, Any] = {
    'adapter.target_modules': 'all-linear',
    'model.threads': 1, 'model.weight_dtype': 'float32', 'finetune.learning_rate': 0.01,
    'finetune.replay_weight': 1.0, 'finetune.replay_samples': 2,
    'generation.max_tokens': 8, 'scheduler.max_slowdown': 10.0,
    'drift.min_budget': 1.0,
    # A slow machine under constant load must learn as well.
    'slo.freshness_s': 5.0, 'finetune.min_share': 0.5,
    # With rollbacks off, an older live version means that a version was lost.
    'gate.auto_rollback': False}


def tiny_model(folder: Path) -> Path:
    """Write a small model with random weights and the tokenizer of the packaged model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mace_ros.model.loading import load_model

    tokenizer = load_model('', device='cpu').tokenizer
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def kill_repeatedly(folder: Path, model: str, aims: Sequence[str], seed: int) -> dict[str, Any]:
    """Kill a node once for each aim; return a row for each kill and the errors in the log."""
    rng = random.Random(seed)
    parameters = {'model.source': model, **PARAMETERS}
    storage = folder / 'storage'
    promises = Promises()
    snapshot: StorageSnapshot | None = None
    rows: list[dict[str, Any]] = []
    errors: Counter[str] = Counter()
    ready_s = RUN_S
    for number, aim in enumerate([*aims, 'none']):      # the last run only shows the start
        node = NodeRun(folder, parameters, number, rng, promises)
        try:
            if aim == 'starting':
                time.sleep(rng.uniform(0.0, ready_s))
            else:
                ready_s = node.start(snapshot)
                node.run_until(aim)
        except BaseException:
            print(node.log, file=sys.stderr)
            raise
        finally:
            node.kill()
        if rows:
            rows[-1]['started_on'] = node.wrong_start
        errors += node.errors
        if aim == 'none' or not (storage / JOURNAL).exists():
            continue
        snapshot = inspect_storage(storage)
        rows.append(_row(aim, node, snapshot, promises))
        print(f'{number + 1}: {aim}, in {" and ".join(rows[-1]["phases"])}; '
              f'{rows[-1]["acknowledged"]} acknowledged, live {rows[-1]["live"]}', flush=True)
    return {'kills': rows, 'log': dict(errors)}


def _row(aim: str, node: NodeRun, snapshot: StorageSnapshot,
         promises: Promises) -> dict[str, Any]:
    """Return the sample of one kill."""
    return {
        'aim': aim, 'phases': node.phases(snapshot), 'lived_s': node.lived_s,
        'acknowledged': len(promises.acknowledged),
        'lost': lost_corrections(snapshot, promises.acknowledged),
        'published': len(snapshot.versions),
        'older': outdated_profiles(snapshot, promises.announced),
        'live': {p or 'robot': v for p, (v, _) in snapshot.live.items()},
        'damaged': list(snapshot.damaged), 'unknown': node.unknown_versions(snapshot),
        'started_on': []}
