# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Conversion between conversations and token ids, and streaming detokenisation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import takewhile
import json
from pathlib import Path
import re
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mace_ros.api.events import ToolCall
from mace_ros.model.tool_calls import (
    for_template,
    format_of,
    MARKERS,
    ToolFormat,
    Tools,
)

# role and content, and where there are any, tool_calls (id, name, and arguments as JSON text),
# tool_call_id, and raw: the content is a whole prompt, which no template renders.
Message = Mapping[str, Any]


class TemplateRefusal(ValueError):
    """The chat template does not take a conversation; the message says why."""


class ChatTokenizer:
    """A model's tokenizer together with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase,
                 eos_token_ids: int | Sequence[int] | None = None) -> None:
        """``eos_token_ids`` come from the model's generation config."""
        self.tokenizer = tokenizer
        # A text may name the special tokens that structure a conversation, but not contain them.
        self._special = re.compile('|'.join(
            map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))) or '(?!)')
        self._plain = deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        # The markers of tool calls that are special tokens, by their ids.
        self.markers: dict[int, str] = {
            i: token.content for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content in MARKERS}
        self._marker = re.compile(
            f'({"|".join(map(re.escape, self.markers.values())) or "(?!)"})')
        self.end_of_turn = self._find_end_of_turn()
        # The tokens that begin a user turn; empty if the template has no recognisable ones.
        self.invocation = self._find_invocation()
        listed = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or ())
        ends = {*listed, self.end_of_turn, tokenizer.eos_token_id}
        self.end_tokens = frozenset(e for e in ends if e is not None)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the chat template writes tool calls; None if it does not render tools."""
        if self.tokenizer.chat_template is None:
            return None
        turns = [{'role': 'user', 'content': 'a'}]
        tools = for_template([{'name': 'wxyz', 'description': 'Qrst.', 'parameters': ''}])
        try:
            without, with_tools = (self.tokenizer.apply_chat_template(
                turns, tools=each, add_generation_prompt=True, tokenize=False)
                for each in (None, tools))
        except TemplateError:
            return None
        if without == with_tools:
            return None
        return format_of(self.tokenizer.get_chat_template(tools=tools))

    def raw_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is a whole prompt, special tokens included."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """
        Return the ids of a conversation, up to the start of the next response.

        A raw prompt is a single message, which is taken as it is.
        Raises :class:`TemplateRefusal` if the chat template does not take it.
        """
        if messages[0].get('raw'):
            return self.raw_prompt(messages[0]['content'])
        if tools and self.tool_format is None:
            name = Path(self.tokenizer.name_or_path).name or 'the model'
            raise TemplateRefusal(f'tools: the chat template of {name} does not render tools')
        if self.tokenizer.chat_template is None:
            lines = [f'{m["role"].capitalize()}: {self._quoted(m["content"])}' for m in messages]
            return self.tokenizer.encode('\n'.join([*lines, 'Assistant:']))
        try:
            return self._templated(messages, tools)
        except TemplateError as error:
            if messages[0]['role'] != 'system' or len(messages) < 2:
                raise TemplateRefusal(f'the chat template refuses the messages: {error}') from error
        # Some templates (Gemma's) have no system role: prepend it to the first question.
        system, first, *rest = messages
        content = f'{system["content"]}\n\n{first["content"]}'
        try:
            return self._templated([{**first, 'content': content}, *rest], tools)
        except TemplateError as error:
            raise TemplateRefusal(f'the chat template refuses the messages: {error}') from error

    def _templated(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        called = {call['id']: call['name'] for m in messages for call in m.get('tool_calls', ())}
        ids: list[int] = self.tokenizer.apply_chat_template(
            [self._for_template(m, called) for m in messages],
            tools=self._quoted(for_template(tools)) if tools else None,
            add_generation_prompt=True, return_dict=False,
            # A model that can think first (Qwen3, SmolLM3) would spend an answer's time on it.
            enable_thinking=False)
        return ids

    def _for_template(self, message: Message, called: Mapping[str, str]) -> dict[str, Any]:
        """Return a message as templates take it; ``called`` has the tools' names by call id."""
        made = {'role': message['role'], 'content': self._quoted(message['content'])}
        if message.get('tool_calls'):
            made['tool_calls'] = [{
                'id': self._quoted(call['id']), 'type': 'function', 'function': {
                    'name': call['name'],
                    'arguments': self._quoted(json.loads(call['arguments'] or '{}'))}}
                for call in message['tool_calls']]
        if message['role'] == 'tool':
            call_id = message.get('tool_call_id', '')
            made |= {'tool_call_id': self._quoted(call_id), 'name': called.get(call_id, '')}
        return made

    def _quoted(self, value: Any) -> Any:
        """Return a text or a value of texts without special tokens, which could end its turn."""
        if isinstance(value, str):
            return self._special.sub(lambda found: f'{found[0][:1]} {found[0][1:]}', value)
        if isinstance(value, dict):
            return {self._quoted(key): self._quoted(each) for key, each in value.items()}
        return [self._quoted(each) for each in value] if isinstance(value, list) else value

    def plain(self, text: str) -> list[int]:
        """Return the ids of a text by itself, with the tokens that the model puts around one."""
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def answer(self, text: str) -> list[int]:
        """
        Return the ids of a whole response with its end-of-turn token, as it is trained.

        Special tokens in it are text, except for the markers of tool calls.
        """
        ids: list[int] = []
        for i, part in enumerate(self._marker.split(text)):
            ids += ([self.tokenizer.convert_tokens_to_ids(part)] if i % 2
                    else self._plain.encode(part, add_special_tokens=False).ids)
        return ids if self.end_of_turn is None else [*ids, self.end_of_turn]

    def adapted_from(self, prompt: Sequence[int]) -> int:
        """
        Return the position in a prompt from which an adapter acts: its last user turn.

        0, the whole prompt, if the template has no recognisable user turn. As in activated LoRA
        (arXiv 2504.12397) and PEFT's ``alora_invocation_tokens``.
        """
        return next(self._turns(prompt, last_first=True), 0)

    def first_turn(self, prompt: Sequence[int]) -> int:
        """Return the position of the first user turn in a prompt; 0 if there is none."""
        return next(self._turns(prompt), 0)

    def _turns(self, prompt: Sequence[int], *, last_first: bool = False) -> Iterator[int]:
        """Yield the positions of the user turns."""
        header = self.invocation
        starts = range(len(prompt) - len(header) + 1) if header else range(0)
        return (i for i in (reversed(starts) if last_first else starts)
                if tuple(prompt[i:i + len(header)]) == header)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a response's ids, without special tokens."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _find_end_of_turn(self) -> int | None:
        """Return the token that ends an assistant's turn in the chat template."""
        eos: int | None = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None:
            return eos
        turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False)
        tail = rendered.rsplit('b', 1)[-1]
        special = set(self.tokenizer.all_special_ids)
        ids = self.tokenizer.encode(tail, add_special_tokens=False)
        return next((i for i in ids if i in special), eos)

    def _find_invocation(self) -> tuple[int, ...]:
        """
        Return the tokens that begin a user's turn and no other.

        They begin with a special token, which no text can contain. White space at their end is
        left out, because a text that begins with white space merges with it.
        """
        if self.tokenizer.chat_template is None:
            return ()
        texts = ('Wxyz?', 'Qrst?')
        turns = [{'role': 'user', 'content': texts[0]}, {'role': 'assistant', 'content': 'Yes.'},
                 {'role': 'user', 'content': texts[1]}]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False)
        except TemplateError:
            return ()
        encoded = self.tokenizer(
            rendered, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded['input_ids'], [end for _, end in encoded['offset_mapping']]
        before = [ids[:bisect_right(ends, rendered.find(text))] for text in texts]
        common = list(takewhile(
            lambda pair: pair[0] == pair[1], zip(*map(reversed, before), strict=False)))
        header = [token for token, _ in reversed(common)]
        special = set(self.tokenizer.all_special_ids)
        while header and header[-1] not in special and not self.tokenizer.decode(
                header[-1]).strip():
            header.pop()
        for start in reversed([i for i, token in enumerate(header) if token in special]):
            if _count(ids, header[start:]) == len(texts):
                return tuple(header[start:])
        return ()


def _count(ids: Sequence[int], part: Sequence[int]) -> int:
    """Return how often ``part`` occurs in ``ids``."""
    return sum(list(ids[i:i + len(part)]) == list(part) for i in range(len(ids)))


class TextStream:
    """
    Converts the tokens of a response to text as they are sampled.

    It returns only whole UTF-8 characters, and holds back text that may be the start of a stop
    string. The response ends before the first stop string.
    """

    def __init__(self, chat: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stop = tuple(s for s in stop if s)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ''
        self._begin = 0     # of the text of _ids
        self._sent = 0
        self.stopped = False
        self.calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text so far, up to a stop string, with tool calls as the model writes them."""
        return self._text

    @property
    def content(self) -> str:
        """The text without tool calls."""
        return self._text

    def push(self, token: int) -> str:
        """Add the next token; return the new text that is final, which may be empty."""
        if self.stopped:
            return ''
        self._ids.append(token)
        text = self._decoder.step(self._chat.tokenizer.backend_tokenizer, token)
        return self._add(text) if text else ''

    def finish(self) -> str:
        """Return the text held back until the end of the response."""
        if not self.stopped:
            self._flush()
        rest, self._sent = self._text[self._sent:], len(self._text)
        return rest

    def _flush(self) -> None:
        """Take the text that the decoder holds back, without a character that has been cut."""
        self._text += self._chat.decode(self._ids)[len(self._text) - self._begin:].rstrip('\ufffd')

    def _add(self, new: str) -> str:
        self._text += new
        found = [i for s in self._stop if (i := self._text.find(s, self._sent)) >= 0]
        if found:
            self._text, self.stopped = self._text[:min(found)], True
        final = len(self._text) if self.stopped else len(self._text) - self._held_back()
        text, self._sent = self._text[self._sent:final], final
        return text

    def _held_back(self) -> int:
        """Return the number of last characters that may be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-n:]
            if any(s.startswith(tail) for s in self._stop):
                return n
        return 0
