# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Streaming detokenisation of a response that may call tools."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from mace_ros.model.chat import ChatTokenizer, TextStream
from mace_ros.model.tool_calls import ToolCallParser, Tools


class ToolCallStream(TextStream):
    """
    Converts the tokens of a response that may call tools into text.

    Text that may be part of a call is held back. At the end, ``calls`` are the calls of the
    response, and ``content`` is its text without them.
    """

    def __init__(self, chat: ChatTokenizer, parser: ToolCallParser,
                 stop: Sequence[str] = ()) -> None:
        super().__init__(chat, stop)
        self._parser = parser
        self._final = ''            # the text that TextStream has returned
        self._content = ''          # the part of it that was returned by push() and finish()
        self._finished = False

    @property
    def content(self) -> str:
        """The text without tool calls."""
        return self._content

    def push(self, token: int) -> str:
        """Add the next token; return the new text outside calls, which may be empty."""
        marker = self._chat.markers.get(token)
        if marker is None or self.stopped:
            self._final += super().push(token)
        else:
            self._flush()
            self._final += self._add(marker)
            self._ids, self._begin = [], len(self._text)
            self._decoder = DecodeStream(skip_special_tokens=True)
        return self._show(self._final[:self._parser.visible(self._final)])

    def finish(self) -> str:
        """Parse the calls; return the text held back until the end of the response."""
        self._final += super().finish()
        if self._finished:
            return ''
        self._finished = True
        content, self.calls = self._parser.split(self._final)
        return self._show(content)

    def _show(self, content: str) -> str:
        new, self._content = content[len(self._content):], max(content, self._content, key=len)
        return new


def text_stream(chat: ChatTokenizer, stop: Sequence[str], tools: Tools) -> TextStream:
    """Return the stream of an answer to a prompt that offers these tools."""
    if not tools or chat.tool_format is None:
        return TextStream(chat, stop)
    return ToolCallStream(
        chat, ToolCallParser(chat.tool_format, {tool['name'] for tool in tools}), stop)
