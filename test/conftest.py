# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal

import pytest
from support.graph import use_another_domain
from support.precision import CAPABILITIES
from support.robot import RANDOM_MODEL, Robot
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mace_ros.api.settings import Settings
from mace_ros.engine import anchor_requests, builder
from mace_ros.engine.builder import build_engine
from mace_ros.learning.anchors import ANCHORS
from mace_ros.model.loading import load_model, LoadedModel

# Tokens of the tiny model: most of its time would go into those that no test needs.
VOCABULARY = 8192


# The files that take longest, in the order in which workers should begin them: one that began
# last would keep a single worker busy at the end.
LONGEST = (
    'ros/test_node.py', 'package/test_colcon.py', 'ros/test_lifecycle.py',
    'engine/test_engine_memory.py', 'ros/test_interfaces.py', 'learning/test_learning.py',
    'bench/test_durability.py', 'engine/test_engine.py', 'bench/test_benchmarks.py',
    'finetune/test_finetune_step.py', 'learning/test_rollback.py', 'cli/test_programs.py')


def tiny_model(folder: Path, tokens: int, seed: int) -> None:
    """Save a tiny model of random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)


def keep_tokens(path: Path, count: int) -> None:
    """Leave a tokenizer its first tokens: they are in the order in which BPE has merged them."""
    tokenizer = json.loads(path.read_text())
    model = tokenizer['model']
    model['vocab'] = {text: i for text, i in model['vocab'].items() if i < count}
    model['merges'] = [pair for pair in model['merges'] if ''.join(pair) in model['vocab']]
    path.write_text(json.dumps(tokenizer))


def pytest_configure(config: pytest.Config) -> None:
    """Let what is tested hear Ctrl-C; give each of several processes cores of its own."""
    # A shell without job control starts background jobs, and so their children, deaf to it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, 'workerinput', None)    # of pytest-xdist
    if worker is None or not hasattr(os, 'sched_setaffinity'):
        return
    cores, count = sorted(os.sched_getaffinity(0)), worker['workercount']
    own = cores[int(worker['workerid'].removeprefix('gw'))::count]
    if own:
        os.sched_setaffinity(0, own)
        torch.set_num_threads(len(own))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the tests of a file keep their order."""
    folder = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(folder).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(scope='session', autouse=True)
def in_haste() -> Iterator[None]:
    """
    Load soon, and learn soon: of a random model there is little to keep, and times matter less.

    Programs that are tested as processes are as they are.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_requests, 'ANCHORS', ANCHORS[::6])
        patch.setattr(builder, 'CALIBRATION_S', 0.5)
        yield


@pytest.fixture(scope='session', autouse=True)
def same_cpu() -> Iterator[None]:
    """Let the precision that is best for this CPU be the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, 'get_capabilities', lambda: CAPABILITIES)
        yield


@pytest.fixture(scope='module', autouse=True)
def domain() -> None:
    """Let a file not meet nodes that the one before it has killed: for a while, they seem to be."""
    use_another_domain()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny products are slower on more threads, and very slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def base_model() -> LoadedModel:
    """Return the packaged model, in fp32 on the CPU; tests must not change it."""
    return load_model(device='cpu', dtype='float32')


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory: pytest.TempPathFactory, base_model: LoadedModel) -> Path:
    """Make a tiny model in a folder, whose tokens are the first ones of the packaged one."""
    folder = tmp_path_factory.mktemp('tiny')
    base_model.tokenizer.save_pretrained(folder)
    keep_tokens(folder / 'tokenizer.json', VOCABULARY)
    tiny_model(folder, VOCABULARY, seed=2)
    return folder


@pytest.fixture(scope='session')
def all_tokens(tmp_path_factory: pytest.TempPathFactory, base_model: LoadedModel) -> Path:
    """Make one with all tokens, for tests that count bytes: the head is most of it."""
    folder = tmp_path_factory.mktemp('tiny_with_all')
    base_model.tokenizer.save_pretrained(folder)
    tiny_model(folder, len(base_model.tokenizer), seed=0)
    return folder


@pytest.fixture(scope='module')
def settings(model_folder: Path) -> Settings:
    """Return settings for the tiny model on the CPU."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        # Texts are compared, of passes that are not the same: rounding must not matter.
        'model.weight_dtype': 'float32',
        **RANDOM_MODEL,
        'memory.kv_cache_tokens': 8192, 'generation.max_tokens': 12})


@pytest.fixture
def robot(settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Return a fresh engine; afterwards nothing may be left in the KV cache."""
    engine = build_engine(settings, storage=tmp_path)
    everything = engine.free_kv_tokens
    yield Robot(engine)
    engine.close()
    assert engine.free_kv_tokens == everything
