# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A version's description: as an event, and as PEFT's adapter configuration."""

from __future__ import annotations

from typing import Protocol

from peft import LoraConfig

from mace_ros.api.events import AdapterVersion, VersionState
from mace_ros.store.adapter_store import AdapterStore
from mace_ros.store.records import VersionRecord


class AdapterShape(Protocol):
    """The properties of a LoRA adapter that its versions share."""

    rank: int
    alpha: float
    invocation: tuple[int, ...]     # tokens from which it acts; empty: on all tokens

    @property
    def target_modules(self) -> list[str]:
        """Names of the adapted modules, as PEFT matches them."""


class OtherAdapter(ValueError):
    """A version has another adapter shape than the configured one; the message has advice."""


def version_event(record: VersionRecord, store: AdapterStore,
                  state: VersionState | None = None, reason: str = '') -> AdapterVersion:
    """Return the event of a version; ``state`` and ``reason`` override those of the record."""
    return AdapterVersion(
        profile=record.profile, version=record.version, parent=record.parent,
        state=record.state if state is None else state, reason=reason or record.reason,
        correction_ids=record.correction_ids, score_before=record.score_before,
        score_after=record.score_after, train_tokens=record.train_tokens,
        train_seconds=record.train_seconds,
        path=str(store.absolute(record.path)) if record.path else '',
        sha256=record.sha256)


def peft_config(adapter: AdapterShape, model_name: str) -> dict[str, object]:
    """Return the ``adapter_config.json`` of adapters of this shape."""
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=adapter.target_modules,
        alora_invocation_tokens=list(adapter.invocation) or None,
        task_type='CAUSAL_LM', base_model_name_or_path=model_name,
        inference_mode=True).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def check_same_adapter(record: VersionRecord, store: AdapterStore, adapter: AdapterShape) -> None:
    """
    Raise :class:`OtherAdapter` unless a saved version has this shape.

    A version of another rank could be neither served nor trained on; with another alpha its
    answers would differ from those that passed the gate. Raises ``CorruptVersion``.
    """
    saved = store.config(record.path)
    for key, parameter, expected in (
            ('r', 'adapter.rank', adapter.rank), ('lora_alpha', 'adapter.alpha', adapter.alpha),
            ('target_modules', 'adapter.target_modules', adapter.target_modules)):
        if saved.get(key) != expected:
            raise OtherAdapter(
                f'{store.absolute(record.path)} was learned with {parameter} '
                f'{_as_text(saved.get(key))}, not {_as_text(expected)}; set that back, or give '
                'storage.folder another folder')
    if saved.get('alora_invocation_tokens') != (list(adapter.invocation) or None):
        raise OtherAdapter(
            f'{store.absolute(record.path)} was learned by an adapter that acts on other tokens '
            'of a prompt; give storage.folder another folder, and import the corrections there')


def _as_text(value: object) -> str:
    return ','.join(value) if isinstance(value, list) else str(value)
