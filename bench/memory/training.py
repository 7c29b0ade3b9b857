# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The memory that one training step adds to a process: mace_ros and plain PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
import time
from typing import Any

from peft import get_peft_model, LoraConfig
from safetensors.torch import load_file, save_file
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.common.load import prose
from bench.memory.resident import resident_mb, settle
from bench.systems.peers.loading import load
from bench.systems.peers.worker import Worker
from mace_ros.finetune.sample import Sample
from mace_ros.finetune.step import FinetuneStep
from mace_ros.finetune.trainer import Trainer
from mace_ros.model.loading import best_dtype, load_model
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packing import pack
from mace_ros.scheduling.plan import SegmentKind

WARM_UP_TOKENS = 8
LEARNING_RATE = 1e-3
RANK, ALPHA = 8, 16.0


class TrainingStep:
    """
    A step over one sample, measured once in its own process.

    Before the step the process holds only weights: gradients and optimizer state are created
    in the step and count. A warm-up over a few tokens creates threads and kernels.
    """

    def __init__(self, threads: int) -> None:
        """Set the number of compute threads."""
        torch.set_num_threads(threads)
        self._measured = False

    def measure(self, ids: Sequence[int]) -> dict[str, float]:
        """
        Run one step; return its seconds and the memory that it added at its peak.

        Raises ``RuntimeError`` if the process has measured before: memory that the first
        step freed would not count again.
        """
        if self._measured:
            raise RuntimeError('each measurement needs its own process')
        self._measured = True
        self._backward(ids[:WARM_UP_TOKENS])
        self._clear()
        before, began = settle(), time.monotonic()
        self._backward(ids)
        self._update()
        return {'before_mb': before, 'added_mb': resident_mb('VmHWM') - before,
                'seconds': time.monotonic() - began}

    def write_gradients(self, ids: Sequence[int], file: str) -> None:
        """Write the gradients of the sample to a file."""
        self._backward(ids)
        save_file(self._gradients(), file)

    def _backward(self, ids: Sequence[int]) -> None:
        """Compute the gradients of the loss on all tokens but the first."""
        raise NotImplementedError

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradients under PEFT's names."""
        raise NotImplementedError

    def _update(self) -> None:
        """Apply the gradients with the optimizer, and free them."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Free the gradients."""
        raise NotImplementedError


class MaceStep(TrainingStep):
    """The suspendable step of mace_ros; its forward runs alone."""

    def __init__(self, adapter: str, dtype: str, recompute: str, threads: int) -> None:
        """Load; ``recompute`` is a value of ``finetune.recompute``, ``dtype`` a weight dtype."""
        super().__init__(threads)
        model = load_model('', device='cpu', dtype='auto' if dtype == 'int8' else dtype).model
        self._model = pack(model, kv_tokens=256, int8=dtype == 'int8')
        self._lora = LoRAManager(
            self._model.linears, targets='all-linear', rank=RANK, alpha=ALPHA, slots=1)
        self._lora.load(load_file(f'{adapter}/adapter_model.safetensors'))
        self._trainer = Trainer(self._lora, LEARNING_RATE)
        self._keep_graphs = recompute != 'always'
        self._step: FinetuneStep | None = None

    def _backward(self, ids: Sequence[int]) -> None:
        self._step = FinetuneStep(
            self._model, self._trainer, [Sample(tuple(ids), (0.0,) + (1.0,) * (len(ids) - 1))],
            keep_graphs=self._keep_graphs)
        while next(iter(self._step.segments())).kind is not SegmentKind.OPTIMIZER:
            self._step.run_segment()

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in zip(
            self._lora.export(), self._lora.parameters(), strict=True) if p.grad is not None}

    def _update(self) -> None:
        assert self._step is not None
        while not self._step.done:
            self._step.run_segment()

    def _clear(self) -> None:
        self._step = None
        self._trainer.zero_grad()


class PeftStep(TrainingStep):
    """The step of PEFT's documentation."""

    def __init__(self, model: str, adapter: str, dtype: str, threads: int) -> None:
        """Load ``model`` with the PEFT ``adapter``."""
        super().__init__(threads)
        self._model = load(model, adapter, dtype, is_trainable=True).train()
        self._optimizer = torch.optim.AdamW(
            [p for p in self._model.parameters() if p.requires_grad], lr=LEARNING_RATE,
            weight_decay=0.0, fused=True)

    def _backward(self, ids: Sequence[int]) -> None:
        row = torch.tensor([list(ids)])
        self._model(input_ids=row, labels=row, use_cache=False).loss.backward()

    def _gradients(self) -> dict[str, Tensor]:
        return {n.replace('.default.', '.'): p.grad for n, p in self._model.named_parameters()
                if p.grad is not None}

    def _update(self) -> None:
        self._optimizer.step()
        self._clear()

    def _clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


def random_adapter(model: PreTrainedModel, path: Path) -> Path:
    """Write an adapter for all linear layers in PEFT's format, with nonzero weights."""
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules='all-linear',
        task_type='CAUSAL_LM'))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(0.0, 0.01)
    peft.save_pretrained(str(path))
    return path


def gradient_error(ours: Path, theirs: Path) -> float:
    """Return the largest relative error of a tensor between two files of gradients."""
    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        raise ValueError('the files hold gradients of different weights')
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


def compare(folder: Path, *, tokens: int, precisions: Sequence[str], repeats: int, threads: int,
            say: Callable[[str], None]) -> list[dict[str, Any]]:
    """
    Measure steps of all systems, interleaved, each in its own process; return a row for each.

    ``precisions`` are values of ``model.weight_dtype``; PEFT's weights have the dtype in which
    mace_ros computes. In float32 the gradients are compared as well. Files go to ``folder``.
    """
    loaded = load_model('', device='cpu')
    ids, model = loaded.tokenizer(prose())['input_ids'][:tokens], loaded.name
    adapter = str(random_adapter(loaded.model, folder / 'adapter'))
    del loaded
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        ours = {'adapter': adapter, 'dtype': precision, 'threads': threads}
        peer = {'model': model, 'adapter': adapter, 'threads': threads,
                'dtype': 'float32' if precision == 'float32' else best_dtype('cpu')}
        systems: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            'peft': (PeftStep, peer)}
        for recompute in ('always', 'auto'):
            systems[f'mace_ros, {recompute}'] = (MaceStep, {**ours, 'recompute': recompute})
        for repeat in range(repeats):
            for system, (make, arguments) in systems.items():
                row = _in_process(make, arguments, 'measure', list(ids))
                rows.append({'system': system, 'precision': precision, 'repeat': repeat,
                             'tokens': len(ids), **row})
                say(f'{system}, {precision}: {row["added_mb"]:.0f} MB in {row["seconds"]:.1f} s')
        if precision == 'float32':
            files = {system: folder / f'{system}.safetensors' for system in systems}
            for system, (make, arguments) in systems.items():
                _in_process(make, arguments, 'write_gradients', list(ids), str(files[system]))
            for row in rows:
                row['gradient_error'] = gradient_error(files[row['system']], files['peft'])
    return rows


def _in_process(make: Callable[..., Any], arguments: dict[str, Any], method: str,
                *values: Any) -> Any:
    """Create an object in a new process and call one of its methods."""
    worker = Worker(make, **arguments).ready()
    try:
        return worker.call(method, *values)
    finally:
        worker.close()
