# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of decoding alone checks, and what it only reports."""

from __future__ import annotations

from typing import Any

from bench.decode import checks, reported

TIMES = {('mace_ros', 'float32'): 26.0, ('mace_ros', 'bfloat16'): 17.0, ('mace_ros', 'int8'): 16.0,
         ('mace_ros', 'int4'): 11.0, ('hf_generate', 'float32'): 44.0,
         ('hf_generate', 'bfloat16'): 27.0, ('llama_cpp', 'int4'): 10.0,
         ('llama_cpp', 'int8'): 7.0}


def samples(times: dict[tuple[str, str], float] = TIMES) -> dict[str, Any]:
    """Return samples of one repeat."""
    return {
        'default_precision': 'bfloat16',
        'answers': [{'system': system, 'precision': precision, 'repeat': 0, 'tpot_ms': ms}
                    for (system, precision), ms in times.items()],
        'perplexity': [
            {'precision': p, 'perplexity': value, 'tokens': 100, 'weights_mb': mb}
            for p, value, mb in (('float32', 10.0, 400.0), ('bfloat16', 10.01, 200.0),
                                 ('int8', 10.05, 110.0), ('int4', 10.1, 60.0))]}


def test_four_bits_and_bfloat16_have_targets() -> None:
    found = {c.name: c.holds for c in checks(samples())}
    assert found == {
        'decode ms/token, ours float32 / HF generate with PEFT float32': True,
        'decode ms/token, ours bfloat16 (the default) / HF generate with PEFT float32': True,
        'perplexity, bfloat16 (the default) / float32': True,
        'decode ms/token, ours bfloat16 / hf_generate bfloat16': True,
        'decode ms/token, ours int4 / ours int8': True,
        'decode ms/token, ours int4 / llama_cpp int4': True,
        'perplexity, int4 / float32': False,
        'memory of the linear layers and the head, int4 / int8': True}


def test_a_ratio_is_checked_or_reported_but_not_both() -> None:
    """Since pages name it."""
    names = [x.name for x in (*checks(samples()), *reported(samples()))]
    assert len(names) == len(set(names))
    assert 'decode ms/token, ours int8 / llama_cpp int8' in names
    assert 'perplexity, int8 / float32' in names


def test_what_was_not_measured_falls_short() -> None:
    without = {name: ms for name, ms in TIMES.items() if name[0] != 'llama_cpp'}
    [check] = [c for c in checks(samples(without)) if 'llama_cpp' in c.name]
    assert not check.holds
    assert 'not measured' in check.note
