# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Text in, token ids out, and back again piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
import re

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Message = Mapping[str, str]


class ChatTokenizer:
    """A model's tokenizer together with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase,
                 eos_token_ids: int | Sequence[int] | None = None) -> None:
        """``eos_token_ids`` are those of the model's generation config."""
        self.tokenizer = tokenizer
        # Texts may name the tokens that structure a conversation, but not contain them.
        self._special = re.compile('|'.join(
            map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))) or '(?!)')
        self._plain = deepcopy(tokenizer.backend_tokenizer)
        self._plain.encode_special_tokens = True
        self.end_of_turn = self._find_end_of_turn()
        listed = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids or ())
        ends = {*listed, self.end_of_turn, tokenizer.eos_token_id}
        self.end_tokens = frozenset(e for e in ends if e is not None)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation up to where the next answer begins."""
        if self.tokenizer.chat_template is None:
            lines = [f'{m["role"].capitalize()}: {self._quoted(m["content"])}' for m in messages]
            return self.tokenizer.encode('\n'.join([*lines, 'Assistant:']))
        try:
            return self._templated(messages)
        except TemplateError:
            if messages[0]['role'] != 'system' or len(messages) < 2:
                raise
            # Some templates (Gemma's) know no system role: the first question says it then.
            system, first, *rest = messages
            content = f'{system["content"]}\n\n{first["content"]}'
            return self._templated([{'role': first['role'], 'content': content}, *rest])

    def _templated(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            [{**m, 'content': self._quoted(m['content'])} for m in messages],
            add_generation_prompt=True, return_dict=False)
        return ids

    def _quoted(self, text: str) -> str:
        """Return a text in which special tokens are only words, or it could end its own turn."""
        return self._special.sub(lambda found: f'{found[0][:1]} {found[0][1:]}', text)

    def answer(self, text: str) -> list[int]:
        """Return the ids of a whole answer with its end of turn, as it is trained."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids if self.end_of_turn is None else [*ids, self.end_of_turn]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's ids, without special tokens."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _find_end_of_turn(self) -> int | None:
        """Return the token with which the chat template ends an assistant's turn."""
        eos: int | None = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None:
            return eos
        turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False)
        tail = rendered.rsplit('b', 1)[-1]
        special = set(self.tokenizer.all_special_ids)
        ids = self.tokenizer.encode(tail, add_special_tokens=False)
        return next((i for i in ids if i in special), eos)


class TextStream:
    """
    Turns an answer's tokens into text as they come.

    Only whole UTF-8 characters come out, and nothing that may turn out to be the start
    of a stop string; the answer ends before the first stop string.
    """

    def __init__(self, chat: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self._chat = chat
        self._stop = tuple(s for s in stop if s)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ''
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string."""
        return self._text

    def push(self, token: int) -> str:
        """Take the next token; return the new text that is certain, which may be empty."""
        if self.stopped:
            return ''
        self._ids.append(token)
        piece = self._decoder.step(self._chat.tokenizer.backend_tokenizer, token)
        return self._take(piece) if piece else ''

    def finish(self) -> str:
        """Return what was held back at the end of the answer."""
        if not self.stopped:
            # A character that the answer's end cut through is left out.
            self._text += self._chat.decode(self._ids)[len(self._text):].rstrip('\ufffd')
        rest, self._sent = self._text[self._sent:], len(self._text)
        return rest

    def _take(self, new: str) -> str:
        self._text += new
        found = [i for s in self._stop if (i := self._text.find(s, self._sent)) >= 0]
        if found:
            self._text, self.stopped = self._text[:min(found)], True
        certain = len(self._text) if self.stopped else len(self._text) - self._held()
        piece, self._sent = self._text[self._sent:certain], certain
        return piece

    def _held(self) -> int:
        """Return how many last characters may be the start of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-n:]
            if any(s.startswith(tail) for s in self._stop):
                return n
        return 0
