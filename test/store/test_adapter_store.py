# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Saved adapter versions are complete, verified, and in PEFT's format."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch

from mace_ros.store.adapter_store import AdapterStore, CorruptVersion, profile_folder
from mace_ros.store.layout import CONFIG, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': torch.randn(2, 8),
    'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight': torch.randn(8, 2),
}
SETTINGS = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': ['q_proj']}


def everything_below(folder: Path) -> list[str]:
    """Return the relative paths of all files and folders."""
    return sorted(str(found.relative_to(folder)) for found in folder.rglob('*'))


def test_a_saved_version_comes_back(tmp_path: Path) -> None:
    """Bit for bit, for any layout and precision in memory, also after a restart."""
    flat = torch.arange(64.0)
    tensors = {
        **TENSORS, 'bfloat16': torch.randn(3, 5).bfloat16(), 'transposed': torch.randn(4, 6).T,
        'view': flat[8:24].view(4, 4), 'next view': flat[24:32],
        'trained': torch.randn(3, requires_grad=True), 'empty': torch.zeros(0, 4)}
    saved = AdapterStore(tmp_path).save('', 1, tensors, SETTINGS)
    assert saved.path == 'adapters/_robot/v000001'
    store = AdapterStore(tmp_path)
    loaded = store.load(saved.path, saved.sha256)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert store.config(saved.path) == SETTINGS
    assert store.absolute(saved.path) == tmp_path / 'adapters' / '_robot' / 'v000001'
    assert everything_below(store.absolute(saved.path)) == [CONFIG, WEIGHTS]
    assert AdapterStore(tmp_path / 'other').save('', 1, tensors, SETTINGS) == saved


def test_files_are_synced_before_the_rename_and_folders_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = AdapterStore(tmp_path)
    store.save('', 1, TENSORS, SETTINGS)
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        events.append(f'rename to {target.name}')
        rename(source, target)

    monkeypatch.setattr(os, 'fsync', spy_fsync)
    monkeypatch.setattr(os, 'replace', spy_replace)
    store.save('', 2, TENSORS, SETTINGS)
    assert events == [WEIGHTS, CONFIG, '.tmp-v000002', 'rename to v000002', '_robot']
    events.clear()
    AdapterStore(tmp_path / 'new').save('', 1, TENSORS, SETTINGS)
    # New folders are synced into their parents, too.
    assert set(events[:3]) == {'adapters', 'new', tmp_path.name}


CRASH = """
import os, sys
import torch
from mace_ros.store.adapter_store import AdapterStore

def save_and_die(folder, function, calls):
    store = AdapterStore(folder)
    original = getattr(os, function)

    def die(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os._exit(42)
        return original(*arguments)

    setattr(os, function, die)
    store.save('ann', 2, {'weight': torch.ones(1000)}, {'r': 8})

for folder, function, calls in zip(*[iter(sys.argv[1:])] * 3):
    if os.fork() == 0:
        save_and_die(folder, function, int(calls))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_crash_while_saving_leaves_no_version(tmp_path: Path) -> None:
    """Processes that end before the rename, or with one of the two files written."""
    moments = {tmp_path / 'a': ('replace', '0'), tmp_path / 'b': ('fsync', '1')}
    first = {folder: AdapterStore(folder).save('ann', 1, TENSORS, SETTINGS) for folder in moments}
    before = everything_below(tmp_path / 'a')
    # One process imports torch and forks, since importing it twice would take too long.
    crashed = subprocess.run(
        [sys.executable, '-c', CRASH, *(str(a) for f, m in moments.items() for a in (f, *m))],
        cwd=ROOT, timeout=60, text=True, capture_output=True)
    assert crashed.stdout.split() == ['42', '42'], crashed.stderr
    for folder in moments:
        assert everything_below(folder) != before  # the crash came after the first write
        assert [found.name for found in folder.glob('adapters/*/v*')] == ['v000001']
        store = AdapterStore(folder)
        assert everything_below(folder) == before
        store.load(first[folder].path, first[folder].sha256)
        second = store.save('ann', 2, TENSORS, SETTINGS)
        store.load(second.path, second.sha256)


def test_a_failing_disk_leaves_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is raised, and the same version can be saved once the disk works again."""
    store = AdapterStore(tmp_path)

    def no_space(descriptor: int) -> None:
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as broken:
        store.save('', 1, TENSORS, SETTINGS)
        before = everything_below(tmp_path)
        broken.setattr(os, 'fsync', no_space)
        with pytest.raises(OSError, match='No space left'):
            store.save('', 2, TENSORS, SETTINGS)
        assert everything_below(tmp_path) == before
    store.save('', 2, TENSORS, SETTINGS)
    with pytest.raises(FileExistsError, match='new version'):
        store.save('', 2, TENSORS, SETTINGS)
    with pytest.raises(ValueError, match='base model'):
        store.save('', 0, TENSORS, SETTINGS)


def test_a_loaded_version_does_not_depend_on_its_file(tmp_path: Path) -> None:
    """Access to a mapped file that is truncated, or whose disk fails, would end the process."""
    store = AdapterStore(tmp_path)
    saved = store.save('', 1, TENSORS, SETTINGS)
    loaded = store.load(saved.path, saved.sha256)
    assert WEIGHTS not in Path('/proc/self/maps').read_text()
    os.truncate(store.absolute(saved.path) / WEIGHTS, 0)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_damaged_version_is_refused(tmp_path: Path) -> None:
    """One flipped bit, a truncated file, a missing file, a broken configuration."""
    store = AdapterStore(tmp_path)
    saved = store.save('', 1, TENSORS, SETTINGS)
    weights = store.absolute(saved.path) / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptVersion, match=r'SHA-256.*put back a backup'):
        store.load(saved.path, saved.sha256)
    weights.write_bytes(content[:-1])
    with pytest.raises(CorruptVersion, match='SHA-256'):
        store.load(saved.path, saved.sha256)
    weights.unlink()
    with pytest.raises(CorruptVersion, match='No such file'):
        store.load(saved.path, saved.sha256)
    for broken in ('{"r": 2', '[]'):
        (store.absolute(saved.path) / CONFIG).write_text(broken)
        with pytest.raises(CorruptVersion, match=CONFIG):
            store.config(saved.path)


ODD_NAMES = [
    '', '_robot', 'robot', 'ann', 'Ann', 'ANN', 'a/b', 'a\\b', '../../etc/passwd', '.', '..', '/',
    '-rf', 'CON', 'nul.txt', ' ', '  ', '\n', '\0', '\N{ROBOT FACE}' * 128, '漢字', '汉字', 'Zoë',
    'Zoe\u0308', 'Zoe', 'x' * 128, 'x' * 127 + 'y', 'a' * 39 + '-b', profile_folder('Ann'),
    'ann\u200b', '\udc80', '%', '~', '*', '$HOME', "'; DROP TABLE"]


def test_every_profile_name_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Unique, safe on every file system, and readable where the name is ASCII."""
    folders = [profile_folder(name) for name in ODD_NAMES]
    assert len({folder.lower() for folder in folders}) == len(ODD_NAMES)
    assert all(len(folder) <= 64 and folder.isascii() for folder in folders)
    assert profile_folder('') == '_robot'
    assert profile_folder('Zoë Smith').startswith('zoe-smith-')
    store = AdapterStore(tmp_path)
    for number, name in enumerate(ODD_NAMES):
        saved = store.save(name, 1, {'weight': torch.tensor([number])}, {})
        assert int(store.load(saved.path, saved.sha256)['weight']) == number
    # Everything is two levels below adapters/.
    assert everything_below(tmp_path)[0] == 'adapters' and len(list(tmp_path.iterdir())) == 1
    assert len(list(tmp_path.glob(f'adapters/*/v000001/{WEIGHTS}'))) == len(ODD_NAMES)


def test_removing_a_version_leaves_the_others(tmp_path: Path) -> None:
    """Removing it again does nothing."""
    store = AdapterStore(tmp_path)
    saved = [store.save(name, number, TENSORS, SETTINGS)
             for name in ('', 'ann') for number in (1, 2)]
    for _ in range(2):
        store.remove(saved[0].path)
    store.remove('adapters/nobody/v000001')
    with pytest.raises(CorruptVersion, match='No such file'):
        store.load(saved[0].path, saved[0].sha256)
    for kept in saved[1:]:
        store.load(kept.path, kept.sha256)
    assert len(list(tmp_path.glob('adapters/*/*'))) == 3


def test_peft_loads_a_saved_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loaded adapter gives the same logits, without a network."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    from peft import get_peft_model, get_peft_model_state_dict, LoraConfig, PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(shape).eval()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.randint(0, 64, (1, 12))
    without = base(ids).logits
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj', 'down_proj'],
        init_lora_weights=False, task_type='CAUSAL_LM')
    adapted = get_peft_model(base, config).eval()
    expected = adapted(ids).logits
    assert not torch.allclose(expected, without, atol=1e-3)

    settings = {
        'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': '', 'r': 4,
        'lora_alpha': 8, 'lora_dropout': 0.0, 'bias': 'none', 'inference_mode': True,
        'target_modules': ['q_proj', 'v_proj', 'down_proj']}
    store = AdapterStore(tmp_path)
    saved = store.save('Zoë', 1, get_peft_model_state_dict(adapted), settings)
    assert json.loads((store.absolute(saved.path) / CONFIG).read_text()) == settings

    fresh = LlamaForCausalLM(shape).eval()
    fresh.load_state_dict(plain)
    loaded = PeftModel.from_pretrained(fresh, store.absolute(saved.path)).eval()
    assert torch.equal(loaded(ids).logits, expected)
