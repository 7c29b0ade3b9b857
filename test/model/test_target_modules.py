# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""``adapter.target_modules`` selects the linear layers that have adapters."""

from __future__ import annotations

import pytest
from support.families import tiny_model, with_reference

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize(('family', 'names'), [
    ('llama', ['down_proj', 'o_proj']), ('phi3', ['down_proj', 'o_proj']),
    ('opt', ['fc2', 'out_proj']),
    ('gpt-neox', ['dense', 'dense_4h_to_h']), ('starcoder2', ['c_proj', 'o_proj']),
    ('qwen3-moe', ['o_proj']), ('deepseek-v2', ['down_proj', 'o_proj'])])
def test_output_linear_selects_the_last_layers_of_attention_and_mlp(
        family: str, names: list[str]) -> None:
    model, lora, _ = with_reference(tiny_model(family), targets='output-linear')
    assert lora.target_modules == names
    adapted = {s.name for layer in model.linears for s in layer.adapted}
    assert adapted == {s.name for layer in model.linears for s in layer.shards
                       if s.name.rsplit('.', 1)[-1] in names}


def test_unknown_target_modules_are_rejected_by_name() -> None:
    with pytest.raises(ValueError, match=r"adapter\.target_modules: no linear layer matches 'qkv'"):
        with_reference(tiny_model('llama'), targets='qkv')
