# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""One shape in one precision: correctness, passes, segments and contexts."""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

from bench.common.running import Run, Samples
from bench.gpu.models import packed, random_model, RANK
from bench.systems.decode_contexts import measure_contexts
from bench.systems.device_timing import reading, repeated, timed, weight_bytes

CONTEXT, STEP_TOKENS = 512, 128
UNLEARNED = 64      # tokens at the start of a sample that have no loss
STEP_BLOCK = 64     # the first KV block of the step's forward
PREFILL_BLOCK = 96  # the first KV block of the prompt
CAPTURE_S = 120.0   # at most, for capturing CUDA graphs


def measure_shape(shape: str, weights: str, run: Run, samples: Samples) -> None:
    """Run the parts of one shape and precision."""
    import torch

    from mace_ros.model.hardware import release_memory

    args, parts = run.args, run.args.only
    name = f'{shape} {weights}'
    release_memory()        # of the model before
    base = random_model(shape, args.device)
    if 'passes' in parts and weights == 'bfloat16':
        # Before the model is packed, so that a card need not hold it twice.
        generate = hf_generate(base)
        samples['passes'] += [{'shape': name, 'what': 'hf_generate', 'repeat': i, 'ms': ms}
                              for i, ms in enumerate(repeated(generate, args.repeats))]
        del generate, base
        release_memory()
        base = random_model(shape, args.device)
    model, lora, unused = packed(base, weights)
    for reason in unused:
        run.notes.append(f'{name}: not used: {reason}')
        run.say(run.notes[-1])
    if args.device == 'cuda':
        samples['captures'].append(capture_graphs(name, model, run))
    if 'correctness' in parts:
        from bench.systems.fast_paths import errors

        samples['errors'] += [{'shape': name, 'path': path, 'error': error}
                              for path, error in errors(model)]
    if 'passes' in parts:
        samples['weights'].append(stored_weights(name, model))
        measure_passes(name, model, lora, run, samples)
    if 'contexts' in parts:
        samples['contexts'] += measure_contexts(name, model, run)
    if args.device == 'cuda':
        run.notes.append(f'{name}: at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB')
        torch.cuda.reset_peak_memory_stats()


def capture_graphs(name: str, model: Any, run: Run) -> dict[str, Any]:
    """Capture CUDA graphs as an engine does; return how many, their memory and the time."""
    from mace_ros.model.graph_capture import capture
    from mace_ros.model.hardware import free_memory, hardware
    from mace_ros.telemetry.device_counters import DeviceCounters

    counters = DeviceCounters(hardware(model.device))
    began = time.monotonic()
    captured = capture(model, max_rows=4, max_tokens=256, max_context=1024,
                       time_left=lambda: 1.0 - (time.monotonic() - began) / CAPTURE_S,
                       free_bytes=lambda: free_memory(
                           model.device, counters.read().memory_free_mb))
    seconds = time.monotonic() - began
    run.notes.append(
        f'{name}: {captured}; {captured.nbytes / 1e6:.0f} MB, {seconds:.1f} s')
    run.say(run.notes[-1])
    return {'shape': name, 'passes': captured.passes, 'steps': len(captured.steps),
            'bytes': captured.nbytes, 'seconds': seconds}


def stored_weights(name: str, model: Any) -> dict[str, Any]:
    """Return the number of weights of the linear layers, and their bytes."""
    return {'shape': name, 'parameters': sum(x.out_features * x.in_features
                                             for x in model.linears),
            'bytes': sum(x.weight_nbytes for x in model.linears)}


def measure_passes(name: str, model: Any, lora: Any, run: Run, samples: Samples) -> None:
    """Time passes and reading the weights, interleaved; then segments."""
    from mace_ros.finetune.sample import Sample
    from mace_ros.finetune.step import FinetuneStep
    from mace_ros.finetune.trainer import Trainer
    from mace_ros.memory.block_pool import BLOCK_TOKENS
    from mace_ros.model.lora_mapping import FIRST_SERVED_SLOT
    from mace_ros.model.spans import Span

    args = run.args
    trainer = Trainer(lora, 1e-9)
    sample = Sample((7,) * STEP_TOKENS,
                    (0.0,) * UNLEARNED + (1.0,) * (STEP_TOKENS - UNLEARNED))
    blocks = range(CONTEXT // BLOCK_TOKENS + 1)
    span = Span((7,), CONTEXT, blocks, FIRST_SERVED_SLOT, True)
    prompt = Span((7,) * STEP_TOKENS, 0,
                  range(PREFILL_BLOCK, PREFILL_BLOCK + STEP_TOKENS // BLOCK_TOKENS),
                  FIRST_SERVED_SLOT, True)
    step = FinetuneStep(model, trainer, [sample])
    step.hold_blocks([list(range(STEP_BLOCK, STEP_BLOCK + STEP_TOKENS // BLOCK_TOKENS))])
    rows = step.piggyback_spans(STEP_TOKENS)
    timers: dict[str, Callable[[], float]] = {
        'floor': timed(model, reading(weight_bytes(model), args.device)),
        'decode': timed(model, lambda: int(model.run([span]).argmax())),
        'prefill': timed(model, lambda: int(model.run([prompt]).argmax())),
        'finetune forward': timed(model, lambda: model.run((), rows)),
        'fused': timed(model, lambda: int(model.run([span], rows).argmax())),
    }
    for repeat in range(-2, args.repeats):     # the first two are warm-ups
        for what, timer in timers.items():
            seconds = timer()
            if repeat >= 0:
                samples['passes'].append(
                    {'shape': name, 'what': what, 'repeat': repeat, 'ms': seconds * 1e3})
    for repeat in range(-1, max(3, args.repeats // 5)):
        for keep_graphs in (True, False):
            step = FinetuneStep(model, trainer, [sample], keep_graphs=keep_graphs)
            while not step.done:
                began = time.perf_counter()
                segment = step.run_segment()
                model.synchronize()
                if repeat >= 0:
                    samples['segments'].append({
                        'shape': name, 'kind': segment.kind.name, 'tokens': segment.tokens,
                        'ms': (time.perf_counter() - began) * 1e3})


def hf_generate(model: Any, tokens: int = 16) -> Callable[[], float]:
    """Return a function that measures seconds per token of ``generate`` with PEFT attached."""
    from peft import get_peft_model, LoraConfig
    import torch

    peft = get_peft_model(model, LoraConfig(
        r=RANK, lora_alpha=16.0, target_modules='all-linear', task_type='CAUSAL_LM')).eval()
    prompt = torch.full((1, CONTEXT), 7, device=model.device)

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            peft.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                          do_sample=False, max_new_tokens=count, min_new_tokens=count).cpu()
        return time.perf_counter() - began

    return lambda: (seconds(tokens + 1) - seconds(1)) / tokens
