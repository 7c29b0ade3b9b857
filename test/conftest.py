# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
import gc
from itertools import takewhile
import json
import os
from pathlib import Path
import signal

import pytest
from support.graph import ENVIRONMENT, use_another_domain
import support.kernels  # noqa: F401  (before transformers is imported)
from support.precision import CAPABILITIES
from support.robot import RANDOM_MODEL, Robot
from support.ros_graph import Generator, Inputs, NodeProcess
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mace_ros.api.settings import Settings
from mace_ros.engine import anchor_requests, builder
from mace_ros.engine.builder import build_engine
from mace_ros.finetune.calibration import measure, Measured
from mace_ros.learning.anchors import ANCHORS
from mace_ros.model.loading import load_model, LoadedModel
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.ros.client import MaceClient
from mace_ros.store.journal import Journal

# Tokens of the tiny model. With all tokens, most of its time would go into the head.
VOCABULARY = 8192
CALIBRATION_S = 0.5
START_S = 100.0


# The longest test files, in the order in which workers start them. A long file that starts last
# would keep one worker busy while the others are idle.
LONGEST = (
    'ros/test_node.py', 'package/test_colcon.py', 'ros/test_lifecycle.py',
    'cli/test_programs.py', 'bench/test_durability.py', 'ros/test_invalid_input.py',
    'bench/test_benchmarks.py', 'ros/test_shutdown.py', 'bench/test_edits.py',
    'openai/test_openai_clients.py', 'openai/test_openai_trouble.py', 'engine/test_engine.py',
    'finetune/test_finetune_step.py', 'learning/test_outcomes.py', 'ros/test_interfaces.py',
    'ros/test_corrections.py', 'learning/test_rollback.py',
    'learning/test_learning_failures.py', 'learning/test_learning.py', 'learning/test_poison.py')


def tiny_model(folder: Path, tokens: int, seed: int) -> None:
    """Save a tiny model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)


def keep_tokens(path: Path, count: int) -> None:
    """Reduce a tokenizer to its first tokens, which are in the order of the BPE merges."""
    tokenizer = json.loads(path.read_text())
    model = tokenizer['model']
    model['vocab'] = {text: i for text, i in model['vocab'].items() if i < count}
    model['merges'] = [pair for pair in model['merges'] if ''.join(pair) in model['vocab']]
    path.write_text(json.dumps(tokenizer))


def pytest_configure(config: pytest.Config) -> None:
    """Restore the default handler of SIGINT, and give each worker CPU cores of its own."""
    with suppress(ImportError):         # `colcon test` does without hypothesis
        import hypothesis
        # By default an example that takes longer than 0.2 s fails.
        hypothesis.settings.register_profile('any speed', deadline=None, suppress_health_check=[
            hypothesis.HealthCheck.too_slow])
        hypothesis.settings.load_profile('any speed')
    # A shell without job control starts background jobs with SIGINT ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, 'workerinput', None)    # of pytest-xdist
    if worker is None or not hasattr(os, 'sched_setaffinity'):
        return
    cores, count = sorted(os.sched_getaffinity(0)), worker['workercount']
    own = cores[int(worker['workerid'].removeprefix('gw'))::count]
    if own:
        os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own) or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the tests of a file keep their order."""
    folder = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(folder).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(scope='session', autouse=True)
def in_haste(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """
    Calibrate once in this process for each kind of engine, for half a second, on fewer anchors.

    A random model has few answers to preserve, and its exact timing matters less. Programs that
    run as processes are not changed, except by support.hasty_node.
    """
    measured: dict[tuple[object, ...], list[Measured]] = {}

    def measure_once(model: PackedModel, lora: LoRAManager, *, max_tokens: int,
                     clock: Callable[[], float]) -> list[Measured]:
        kind = (model.model.config.to_json_string(), model.dtype, model.kv_blocks, max_tokens,
                torch.get_num_threads(), *(p.shape for p in lora.parameters()))
        if kind not in measured:
            end = clock() + CALIBRATION_S
            measured[kind] = list(takewhile(lambda _: clock() < end, measure(
                model, lora, max_tokens=max_tokens, clock=clock)))
        return measured[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anchor_requests, 'ANCHORS', ANCHORS[:96:6])
        patch.setattr(builder, 'measure', measure_once)
        # Each engine starts on an unknown device, whatever others have measured.
        patch.setattr(builder, 'cache_folder', lambda setting: (
            Path(setting) if setting else tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session', autouse=True)
def frozen_libraries() -> Iterator[None]:
    """
    Keep the objects of imported libraries out of garbage collection.

    Every engine collects garbage when it is built, and unfreezes all objects when it is closed:
    with the libraries, each collection would take 0.2 s.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, 'freeze', lambda: None)
        patch.setattr(gc, 'unfreeze', lambda: None)
        yield


@pytest.fixture(scope='session', autouse=True)
def same_cpu() -> Iterator[None]:
    """Report the same CPU instructions on every machine, since they decide the best precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, 'get_capabilities', lambda: CAPABILITIES)
        yield


@pytest.fixture(scope='module', autouse=True)
def domain() -> None:
    """Use a ROS domain per file: killed nodes of the previous file stay visible for a while."""
    use_another_domain()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: small products are slower on several, and very slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def base_model() -> LoadedModel:
    """Return the packaged model in float32 on the CPU; tests must not change it."""
    return load_model(device='cpu', dtype='float32')


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory: pytest.TempPathFactory, base_model: LoadedModel) -> Path:
    """Return the folder of a tiny model that uses the first tokens of the packaged model."""
    folder = tmp_path_factory.mktemp('tiny')
    base_model.tokenizer.save_pretrained(folder)
    keep_tokens(folder / 'tokenizer.json', VOCABULARY)
    tiny_model(folder, VOCABULARY, seed=2)
    return folder


@pytest.fixture(scope='session')
def all_tokens(tmp_path_factory: pytest.TempPathFactory, base_model: LoadedModel) -> Path:
    """Return the folder of a tiny model with all tokens, whose head takes most of the memory."""
    folder = tmp_path_factory.mktemp('tiny_with_all')
    base_model.tokenizer.save_pretrained(folder)
    tiny_model(folder, len(base_model.tokenizer), seed=0)
    return folder


@pytest.fixture(scope='module')
def tiny_node(
        tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[NodeProcess]:
    """Yield a node whose tiny model learns any correction quickly; clients here see it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        node = NodeProcess(tmp_path_factory.mktemp('tiny_node'), **{
            'model.source': model_folder, 'model.threads': 1, 'model.weight_dtype': 'float32',
            **RANDOM_MODEL, 'monitor.rate_hz': 10.0})
        node.start()
        yield node
        node.kill()


@pytest.fixture(scope='module')
def client(tiny_node: NodeProcess) -> Iterator[MaceClient]:
    """Yield a client of ``tiny_node``, which is ready."""
    with MaceClient() as made:
        made.wait_until_ready(START_S)
        yield made


@pytest.fixture(scope='module')
def inputs(client: MaceClient) -> Inputs:
    """Return publishers of the inputs of ``tiny_node``."""
    return Inputs(client)


@pytest.fixture
def generator(client: MaceClient) -> Iterator[Generator]:
    """Yield a client of the action of ``tiny_node``."""
    with Generator(client) as made:
        yield made


@pytest.fixture(scope='session')
def tiny_settings(model_folder: Path) -> Settings:
    """Return the defaults, with the tiny model on the CPU."""
    return Settings().updated({
        'model.source': str(model_folder), 'model.device': 'cpu', 'model.threads': 1,
        # Tests compare texts of passes in different batches: rounding must not change them.
        'model.weight_dtype': 'float32'})


@pytest.fixture(scope='module')
def settings(tiny_settings: Settings) -> Settings:
    """Return settings with which the tiny model gives short answers, and learns quickly."""
    return tiny_settings.updated({
        **RANDOM_MODEL, 'memory.kv_cache_tokens': 8192, 'generation.max_tokens': 12})


@pytest.fixture
def robot(settings: Settings, tmp_path: Path) -> Iterator[Robot]:
    """Return a new engine; at the end of the test its KV cache must be empty."""
    engine = build_engine(settings, storage=tmp_path)
    everything = engine.free_kv_tokens
    yield Robot(engine)
    engine.close()
    assert engine.free_kv_tokens == everything


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    """Return the path of a journal, in a folder that does not exist yet."""
    return tmp_path / 'storage' / 'journal.sqlite'


@pytest.fixture
def journal(journal_path: Path) -> Iterator[Journal]:
    """Return an empty journal."""
    with Journal(journal_path) as opened:
        yield opened
