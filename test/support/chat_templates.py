# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The usual chat templates, and a small tokenizer to render them with."""

from __future__ import annotations

from tokenizers import pre_tokenizers, Regex, Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mace_ros.model.chat import ChatTokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
LLAMA = (
    '<|begin|>{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content }}'
    '<|eot|>{% endfor %}'
    '{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}')
GEMMA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    '{{ m.content }}<end_of_turn>\n{% endfor %}'
    '{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}')
MISTRAL = (
    '<s>{% for m in messages %}'
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>"
    '{% endif %}{% endfor %}')
PHI = (
    '{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}'
    '{% if add_generation_prompt %}<|assistant|>\n{% endif %}')
# Of a model that can think first, as Qwen3's.
THINKING = CHATML.replace(
    'assistant\n{% endif %}',
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    '<think>\n\n</think>\n\n{% endif %}{% endif %}')
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    '{% if add_generation_prompt %}assistant: {% endif %}')
# With tools, as Qwen's and Hermes' templates have them; a result is rendered as a user turn.
HERMES = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}Tools:\n"
    '{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n'
    "{% elif messages[0].role == 'system' %}"
    '<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}'
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    '{{ m.content }}\n</tool_response><|im_end|>\n'
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for call in m.tool_calls or [] %}<tool_call>\n'
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n"
    '</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}')
# With tools, as Mistral's: the marker of calls is a special token.
MISTRAL_TOOLS = (
    '<s>{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}'
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    '{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}</s>'
    '{% else %} {{ m.content }}</s>{% endif %}{% endfor %}')

SPECIAL = [
    '<|im_start|>', '<|im_end|>', '<|begin|>', '<|start_header|>', '<|end_header|>', '<|eot|>',
    '<start_of_turn>', '<end_of_turn>', '<s>', '</s>', '[INST]', '[/INST]', '<|user|>',
    '<|assistant|>', '<|end|>', '[TOOL_CALLS]']


def chat(template: str | None) -> ChatTokenizer:
    """Return a tokenizer of single characters, words like 'user' and pairs of line breaks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(letters)}
    merges = []
    for word in ('user', 'assistant', 'system', 'model', '\u010a\u010a'):
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            vocabulary.setdefault(word[:i + 1], len(vocabulary))
    tokenizer = Tokenizer(BPE(vocabulary, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'\n+| ?\w+| ?[^\w\n]'), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='</s>', additional_special_tokens=SPECIAL)
    fast.chat_template = template
    return ChatTokenizer(fast)
