# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many decoder families, with PEFT as the reference for adapters."""

from __future__ import annotations

from collections.abc import Mapping
import copy
from pathlib import Path
import random
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
import torch
from torch import Tensor
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from mace_ros.model.int4_checkpoint import checkpoint_of
from mace_ros.model.int4_kernels import Int4Kernel
from mace_ros.model.lora_manager import LoRAManager
from mace_ros.model.packed_model import PackedModel
from mace_ros.model.packing import pack

VOCABULARY = 199
CONTEXT = 160
WINDOW = 11   # shorter than most prompts
RANK, ALPHA = 4, 6.0

_LONGROPE = {'rope_type': 'longrope', 'rope_theta': 10000.0, 'short_factor': [1.0, 1.3, 2.0, 3.0],
             'long_factor': [2.0, 3.0, 5.0, 9.0], 'original_max_position_embeddings': 96}
_LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
           'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
_MIXED = ['sliding_attention', 'full_attention', 'sliding_attention']
_MLA = {'q_lora_rank': 24, 'kv_lora_rank': 16, 'qk_rope_head_dim': 8, 'qk_nope_head_dim': 16,
        'v_head_dim': 12, 'num_key_value_heads': 4, 'rope_interleave': True}
_MOE = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32}

# Special features of a family are set such that ignoring them changes the logits.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('Llama', {}),
    'llama-tied-biased': ('Llama', {
        'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True}),
    'llama3-rope': ('Llama', {'rope_parameters': _LLAMA3}),
    'qwen2': ('Qwen2', {'use_sliding_window': True, 'sliding_window': WINDOW,
                        'max_window_layers': 1}),
    'qwen3': ('Qwen3', {}),
    'qwen3-moe': ('Qwen3Moe', {**_MOE, 'norm_topk_prob': True}),
    'gemma': ('Gemma', {}),
    'gemma2': ('Gemma2', {
        'sliding_window': WINDOW, 'query_pre_attn_scalar': 40, 'attn_logit_softcapping': 3.0,
        'final_logit_softcapping': 8.0, 'layer_types': _MIXED}),
    'gemma3': ('Gemma3Text', {
        'sliding_window': WINDOW, 'query_pre_attn_scalar': 40, 'layer_types': _MIXED}),
    'mistral': ('Mistral', {'sliding_window': WINDOW}),
    'phi3': ('Phi3', {'sliding_window': WINDOW, 'partial_rotary_factor': 0.5}),
    'phi3-longrope': ('Phi3', {
        'rope_parameters': _LONGROPE | {'partial_rotary_factor': 0.5},
        'original_max_position_embeddings': 96, 'partial_rotary_factor': 0.5}),
    'cohere': ('Cohere', {'logit_scale': 0.3, 'use_qk_norm': True}),
    'cohere2': ('Cohere2', {'logit_scale': 0.3, 'sliding_window': WINDOW, 'layer_types': _MIXED}),
    'granite': ('Granite', {
        'embedding_multiplier': 3.0, 'attention_multiplier': 0.4, 'residual_multiplier': 0.6,
        'logits_scaling': 2.5}),
    'olmo': ('Olmo', {'clip_qkv': 0.7}),
    'olmo2': ('Olmo2', {}),
    'gpt-neox': ('GPTNeoX', {'rotary_pct': 0.25, 'use_parallel_residual': True}),
    'starcoder2': ('Starcoder2', {'sliding_window': WINDOW, 'use_bias': True}),
    'glm': ('Glm', {'attention_bias': True}),
    'smollm3': ('SmolLM3', {'no_rope_layers': [1, 0, 1]}),
    'gpt-oss': ('GptOss', {'num_local_experts': 4, 'num_experts_per_tok': 2,
                           'sliding_window': WINDOW, 'layer_types': _MIXED}),
    'deepseek-v2': ('DeepseekV2', {**_MLA, 'first_k_dense_replace': 3}),
    'opt': ('OPT', {'word_embed_proj_dim': 48, 'ffn_dim': 96, 'do_layer_norm_before': True}),
}

# PEFT takes all MLPs of an MoE family for experts, even dense ones.
TARGETS = {'deepseek-v2': 'q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj'}

# Layers of 'deepseek-v2' that route tokens to experts, and add experts that all tokens share.
SHARED_EXPERTS: dict[str, Any] = {
    'first_k_dense_replace': 0, 'num_experts': 4, 'num_experts_per_tok': 2, 'n_shared_experts': 1,
    'moe_intermediate_size': 32, 'n_group': 1, 'topk_group': 1, 'topk_method': 'greedy',
    'routed_scaling_factor': 1.5}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a model of three layers of a family, with the same random weights each time."""
    name, special = FAMILIES[family]
    return random_model(name, **special | changes)


def fewer_layers(family: str, layers: int) -> dict[str, Any]:
    """Return the changes of a family's model by which it has fewer than three layers."""
    types = FAMILIES[family][1].get('layer_types')
    return {'num_hidden_layers': layers} | ({'layer_types': types[:layers]} if types else {})


def random_ids(rng: random.Random, count: int) -> list[int]:
    """Return random token ids without those of padding and the beginning."""
    return [rng.randrange(2, VOCABULARY) for _ in range(count)]


def random_model(config_name: str, **settings: Any) -> PreTrainedModel:
    """Return a model whose weights are large enough that every part affects the logits."""
    general = {
        'vocab_size': VOCABULARY, 'hidden_size': 64, 'intermediate_size': 96,
        'num_hidden_layers': 3, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'head_dim': 16, 'max_position_embeddings': CONTEXT, 'tie_word_embeddings': False,
        'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': None}
    config = getattr(transformers, f'{config_name}Config')(**general | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:   # norms, biases, sinks
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            else:
                parameter.normal_(0.0, 1.3 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def with_reference(model: PreTrainedModel, *, kv_tokens: int = 1024,
                   targets: str = 'all-linear', slots: int = 2, int8: bool = False,
                   int4: Int4Kernel | None = None, invocation: tuple[int, ...] = (),
                   ) -> tuple[PackedModel, LoRAManager, PreTrainedModel]:
    """
    Convert ``model``; return it, its LoRA manager, and an unconverted copy.

    With ``int4``, linear layers have 4 bits, and those of the copy the same values.
    """
    reference = copy.deepcopy(model)
    weights = {} if int4 is None else checkpoint_of(
        copy.deepcopy(model), int4, model.dtype).linears
    packed = pack(model, kv_tokens=kv_tokens, int8=int8, int4=weights)
    if weights:
        for layer in [*packed.linears, *packed.head]:
            parts = layer.weight.split([s.size for s in layer.shards])
            for shard, part in zip(layer.shards, parts, strict=True):
                reference.get_submodule(shard.name).weight.data.copy_(part)
    lora = LoRAManager(packed.linears, targets=targets, rank=RANK, alpha=ALPHA, slots=slots,
                       invocation=invocation)
    return packed, lora, reference


def random_adapter(lora: LoRAManager, seed: int, scale: float = 0.5) -> dict[str, Tensor]:
    """Load random A and B (neither is zero) as master weights, and return them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(t.shape, generator=generator) * scale * t.shape[-1] ** -0.5
               for name, t in lora.export().items()}
    lora.load(tensors)
    return tensors


def publish(path: Path, lora: LoRAManager, tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter in PEFT's format."""
    lora_config(lora).save_pretrained(str(path))
    save_file(dict(tensors), path / 'adapter_model.safetensors', metadata={'format': 'pt'})
    return path


def lora_config(lora: LoRAManager) -> LoraConfig:
    """Return PEFT's configuration of these adapters."""
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0,
                      target_modules=lora.target_modules, task_type='CAUSAL_LM',
                      alora_invocation_tokens=list(lora.invocation) or None)


def gradients(peft: PeftModel) -> dict[str, Tensor]:
    """Return the gradients of the active adapter's weights under their published names."""
    return {name.replace('.default.', '.'): parameter.grad
            for name, parameter in peft.named_parameters() if parameter.grad is not None}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return ‖ours - theirs‖ / ‖theirs‖."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
