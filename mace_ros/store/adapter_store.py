# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Adapter versions on disk, each a folder that ``PeftModel.from_pretrained`` loads.

A version is visible as a whole or not at all, also after a power failure: it is written and
fsynced under a temporary name, renamed, and the rename is fsynced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
import unicodedata

from safetensors import SafetensorError
from safetensors.torch import load, save
import torch

from mace_ros.store.journal_file import make_folder, sync_folder
from mace_ros.store.layout import CONFIG, MODEL, WEIGHTS

_TEMPORARY = '.tmp-'


class OtherModel(ValueError):
    """The storage folder belongs to another base model; the message says what to do."""


class CorruptVersion(RuntimeError):
    """A saved version is missing or damaged; the message says what to do."""


@dataclass(frozen=True)
class SavedAdapter:
    """Path of a saved version, relative to the storage folder, and checksum of its weights."""

    path: str
    sha256: str


class AdapterStore:
    """
    The adapter versions below ``folder/adapters``, one folder per profile.

    Opening the store deletes versions that a crash left half-written, so only the process that
    writes versions may open it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open the store in a storage folder, which need not exist."""
        self.folder = Path(folder).absolute()
        self._adapters = self.folder / 'adapters'
        for leftover in self._adapters.glob(f'*/{_TEMPORARY}*'):
            shutil.rmtree(leftover)

    def save(
        self, profile: str, version: int, tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, object],
    ) -> SavedAdapter:
        """
        Save a version; it is on disk when this returns.

        ``tensors`` have PEFT's names (``base_model.model...lora_A.weight``), are on any device,
        and must not change during the call; ``config`` is PEFT's ``adapter_config.json``.
        Raises ``FileExistsError`` if the version exists, and ``OSError`` if the disk fails:
        then save under a new version number, since this one may be on disk or not.
        """
        target = self._adapters / profile_folder(profile) / f'v{version:06d}'
        if version < 1:
            raise ValueError(f'version {version}: 1 is the first after the base model')
        if target.exists():
            raise FileExistsError(f'{target} exists; move it away, or save under a new version')
        weights = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            # PEFT and transformers refuse weights without the name of their format.
            metadata={'format': 'pt'})
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        temporary = target.with_name(_TEMPORARY + target.name)
        make_folder(target.parent)
        try:
            temporary.mkdir()
            _write(temporary / WEIGHTS, weights)
            _write(temporary / CONFIG, text.encode())
            sync_folder(temporary)
            os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(target.parent)
        return SavedAdapter(
            target.relative_to(self.folder).as_posix(), hashlib.sha256(weights).hexdigest())

    def save_bytes(self, profile: str, version: int, weights: bytes,
                   config: Mapping[str, object]) -> SavedAdapter:
        """Save a version as :meth:`save`, from a safetensors file; raises ``ValueError`` if bad."""
        try:
            tensors = load(weights)
        except SafetensorError as error:
            raise ValueError(f'weights: {error}') from error
        return self.save(profile, version, tensors, config)

    def load(self, path: str, sha256: str) -> dict[str, torch.Tensor]:
        """
        Return the tensors of a saved version.

        The file is read, not mapped: a mapped file that is truncated, or whose disk fails, ends
        the process (SIGBUS). Raises :class:`CorruptVersion` if the tensors are missing or not
        those that were saved.
        """
        content = self._read(path, WEIGHTS)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise self._corrupt(path, WEIGHTS, 'its SHA-256 is not the one in the journal')
        try:
            return load(content)
        except SafetensorError as error:
            raise self._corrupt(path, WEIGHTS, str(error)) from error

    def config(self, path: str) -> dict[str, object]:
        """Return the PEFT configuration of a saved version, or raise CorruptVersion."""
        try:
            config = json.loads(self._read(path, CONFIG))
        except ValueError as error:
            raise self._corrupt(path, CONFIG, str(error)) from error
        if not isinstance(config, dict):
            raise self._corrupt(path, CONFIG, 'it is not a JSON object')
        return config

    def absolute(self, path: str) -> Path:
        """Return the absolute path of a saved version's folder."""
        return self.folder / path

    def remove(self, path: str) -> None:
        """Delete a saved version, if it exists."""
        folder = self.absolute(path)
        # Rename it first: a half-deleted version must not look like a version.
        temporary = folder.with_name(_TEMPORARY + folder.name)
        if folder.exists():
            os.replace(folder, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.parent.exists():
            sync_folder(folder.parent)

    def _read(self, path: str, name: str) -> bytes:
        try:
            return (self.folder / path / name).read_bytes()
        except OSError as error:
            raise self._corrupt(path, name, error.strerror or str(error)) from error

    def _corrupt(self, path: str, name: str, reason: str) -> CorruptVersion:
        return CorruptVersion(
            f'{self.absolute(path) / name}: {reason}; put back a backup of that folder, or publish '
            'an earlier version')


def check_same_model(folder: Path, model: str) -> None:
    """
    Raise :class:`OtherModel` unless the storage folder is new or belongs to this base model.

    ``model`` is the model's :func:`model_note`. The journal's token ids and the adapters are
    meaningless for another model.
    """
    note = folder / MODEL
    known = note.read_text().strip() if note.exists() else ''
    if not known:
        make_folder(folder)
        temporary = folder / f'{_TEMPORARY}{MODEL}'
        _write(temporary, f'{model}\n'.encode())
        os.replace(temporary, note)
        sync_folder(folder)
    elif known != model:
        raise OtherModel(
            f'{folder} holds what another model learned ({known}; this one is {model}); set '
            'storage.folder to another folder, or model.source back')


def profile_folder(profile: str) -> str:
    """
    Return the folder name of a profile: readable, and unique to the profile.

    It has ASCII letters, digits and ``-`` only, which every file system supports; a digest
    keeps names apart that become equal by that, also on file systems that ignore case.
    """
    if not profile:
        return '_robot'
    plain = unicodedata.normalize('NFKD', profile).encode('ascii', 'ignore').decode().lower()
    readable = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')[:40].rstrip('-') or 'profile'
    digest = hashlib.sha256(profile.encode('utf-8', 'surrogatepass')).hexdigest()
    return f'{readable}-{digest[:16]}'


def _write(path: Path, content: bytes) -> None:
    with path.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
