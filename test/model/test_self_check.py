# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The self-check at load rejects models that packed passes would not compute correctly."""

from __future__ import annotations

import pytest
from support.families import (
    CONTEXT,
    random_model,
    tiny_model,
    VOCABULARY,
)
import torch
import transformers

from mace_ros.model import attention
from mace_ros.model.architectures import context_length, UnsupportedModel
from mace_ros.model.packing import pack

SSM = {'num_hidden_layers': 2, 'state_size': 8}

LINEAR = {'linear_num_key_heads': 2, 'linear_num_value_heads': 2, 'linear_key_head_dim': 16,
          'linear_value_head_dim': 16, 'num_experts': 4, 'num_experts_per_tok': 2}

REJECTED = {
    'mamba': ('Mamba', SSM, 'mamba.*attention interface'),
    'jamba': ('Jamba', {'num_experts': 2}, 'jamba.*attention interface'),
    'qwen3-next': ('Qwen3Next', LINEAR, 'qwen3_next.*attention interface'),
    'recurrent-gemma': ('RecurrentGemma', {'lru_width': 64}, 'recurrent_gemma.*recurrent or'),
    'lfm2': ('Lfm2', {'layer_types': ['conv', 'full_attention', 'conv']}, 'lfm2.*conv'),
    'bloom, with alibi': ('Bloom', {'n_head': 4}, 'bloom.*attention interface'),
    'gptj': ('GPTJ', {'n_head': 4, 'rotary_dim': 8}, 'gptj.*attention interface'),
    'llama4, chunked attention': (
        'Llama4Text', {'num_local_experts': 2, 'intermediate_size_mlp': 64,
                       'attention_chunk_size': 8}, 'llama4_text.*chunked_attention'),
    'doge, own mask': ('Doge', {}, 'doge.*attention_mask'),
    'phimoe, window not passed on': (
        'Phimoe', {'num_local_experts': 2, 'sliding_window': 99}, 'phimoe.*off by'),
    'diffllama, two attentions in a layer': ('DiffLlama', {}, 'diffllama.*off by'),
    'gemma4, layers share keys': (
        'Gemma4Text', {'num_kv_shared_layers': 1, 'hidden_size_per_layer_input': 8,
                       'vocab_size_per_layer_input': VOCABULARY, 'global_head_dim': 16,
                       'layer_types': ['full_attention'] * 3}, 'gemma4_text.*pass each other'),
    'bert, looks ahead': ('Bert', {}, 'bert.*off by'),
}

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('case', REJECTED)
def test_an_unsupported_model_is_rejected_by_name(case: str) -> None:
    name, special, message = REJECTED[case]
    if not hasattr(transformers, f'{name}Config'):
        pytest.skip(f'transformers {transformers.__version__} has no {name}')
    model = random_model(name, **special)
    if message.endswith('attention interface') and model._supports_attention_backend:
        pytest.skip(f'transformers {transformers.__version__} runs {name} through its interface')
    with pytest.raises(UnsupportedModel, match=message):
        pack(model, kv_tokens=64)


@pytest.mark.parametrize('ignored', ['sliding_window', 'softcap', 'scaling'])
def test_the_self_check_finds_a_lost_attention_argument(
        ignored: str) -> None:
    def forgetful(*args: object, **kwargs: object) -> object:
        return attention.packed_attention(*args, **{**kwargs, ignored: None})

    transformers.AttentionInterface.register(attention.NAME, forgetful)
    try:
        with pytest.raises(UnsupportedModel, match=r'gemma2.*off by'):
            pack(tiny_model('gemma2'), kv_tokens=64)
    finally:
        transformers.AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_a_model_with_nan_logits_is_rejected() -> None:
    model = tiny_model('llama')
    model.model.norm.weight.data[3] = float('nan')
    with pytest.raises(UnsupportedModel, match='off by inf'):
        pack(model, kv_tokens=64)


@pytest.mark.parametrize('family', ['llama', 'gemma2', 'gpt-oss', 'qwen3-moe', 'deepseek-v2'])
def test_bfloat16_models_pass_the_self_check(family: str) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    assert pack(model, kv_tokens=64).dtype == torch.bfloat16


@pytest.mark.parametrize('rope, longest', [('default', CONTEXT), ('dynamic', 64)])
def test_the_context_is_limited_for_rope_variants_that_depend_on_the_longest_request(
        rope: str, longest: int) -> None:
    model = tiny_model('llama', rope_parameters={
        'rope_type': rope, 'rope_theta': 10000.0, 'factor': 2.0,
        'original_max_position_embeddings': 64})
    assert context_length(model) == longest
    assert context_length(tiny_model('phi3-longrope')) == 96
