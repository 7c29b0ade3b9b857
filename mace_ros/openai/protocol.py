# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Request bodies of OpenAI's API, with additional fields of the node."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

INT32 = 2**31 - 1
INT64 = 2**63 - 1


def _without_nul(text: str) -> str:
    if '\0' in text:    # where a string in a ROS message would end
        raise ValueError('contains a NUL character')
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError('empty')
    return text


def _null(value: object, *, advice: str = '') -> None:
    if value is not None:
        raise ValueError(f'not supported{advice}')


def _all_as_zero(top_k: int) -> int:
    return max(top_k, 0)    # vLLM's clients also say -1 for all tokens


Text = Annotated[str, AfterValidator(_without_nul)]
FilledText = Annotated[Text, AfterValidator(_not_blank)]
# Refused unless null, since ignoring them would change the meaning of a request.
Unsupported = Annotated[None, BeforeValidator(_null)]
OtherFormat = Annotated[None, BeforeValidator(partial(_null, advice='; use response_format'))]
Number = Annotated[float, Field(allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Body(BaseModel):
    """A JSON object; fields of OpenAI's API without a meaning here are ignored."""

    model_config = ConfigDict(extra='ignore', strict=True)


class TextPart(Body):
    """A part of a message; only text is supported."""

    type: Literal['text']
    text: Text


class FunctionCall(Body):
    """The function that a message calls; ``arguments`` is JSON as text."""

    name: Text
    arguments: Text = ''


class MessageToolCall(Body):
    """A call in a message of the assistant."""

    id: Text
    type: Literal['function'] = 'function'
    function: FunctionCall


class Message(Body):
    """A message of a conversation."""

    role: Literal['system', 'developer', 'user', 'assistant', 'tool']
    content: Text | list[TextPart] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Text | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return '\n'.join(part.text for part in self.content)
        return self.content or ''


class Function(Body):
    """A function that the model may call."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class ToolParam(Body):
    """A tool; only functions are supported."""

    type: Literal['function']
    function: Function


class ChosenFunction(Body):
    """The name of the function to call."""

    name: Text


class ChosenTool(Body):
    """The tool to call."""

    type: Literal['function']
    function: ChosenFunction


class JsonSchema(Body):
    """A JSON schema that the answer must match."""

    model_config = ConfigDict(extra='ignore', strict=True, populate_by_name=True)

    name: Text = ''
    schema_: dict[str, Any] = Field(alias='schema')


class FormatParam(Body):
    """The format of the answer; ``regex`` and ``grammar`` are not in OpenAI's API."""

    type: Literal['text', 'json_object', 'json_schema', 'regex', 'grammar']
    json_schema: JsonSchema | None = None
    regex: Text | None = None
    grammar: Text | None = None


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class Request(Body):
    """Fields that chat completions and completions share."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, le=INT32)
    temperature: Number | None = Field(None, ge=0, le=5)
    top_p: Number | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64 - 1, le=INT64)
    stop: Text | list[Text] | None = None
    n: int | None = Field(None, ge=1, le=128)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Not in OpenAI's API; the names are those of vLLM.
    top_k: Annotated[int, Field(ge=-1, le=INT32), AfterValidator(_all_as_zero)] | None = None
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    structured_outputs: OtherFormat = None      # the constraints of vLLM
    guided_json: OtherFormat = None
    guided_regex: OtherFormat = None
    guided_choice: OtherFormat = None
    guided_grammar: OtherFormat = None
    # Fields of the node; see Query.msg.
    priority: int | None = Field(None, ge=-INT32 - 1, le=INT32)
    ttft_slo_ms: Milliseconds | None = None
    tpot_slo_ms: Milliseconds | None = None
    no_learn: bool | None = None


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=0, le=INT32)
    tools: list[ToolParam] | None = Field(None, max_length=128)
    tool_choice: Text | ChosenTool | None = None
    response_format: FormatParam | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None


class CompletionRequest(Request):
    """The body of /v1/completions, whose prompt does not go through the chat template."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    suffix: Unsupported = None
    best_of: Literal[1] | None = None


class FeedbackRequest(Body):
    """
    The body of /v1/feedback; exactly one of ``corrected``, ``hint`` and ``rating`` is required.

    ``id`` is that of a completion, or of the feedback whose proposal is confirmed;
    ``feedback_id`` is the one to give this feedback.
    """

    id: Text = Field(min_length=1)
    feedback_id: str | None = Field(None, pattern=r'^[\w.:-]{1,128}$')
    corrected: FilledText | None = None
    hint: FilledText | None = None
    rating: Literal['down'] | None = None
    weight: Number | None = Field(None, gt=0, le=100)
    scope: Text | None = None
    source: Text | None = None
