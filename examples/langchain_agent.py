# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
Let the robot's model call functions, until it has an answer.

Needs `ros2 run mace_ros openai` and `pip install langchain-openai`.
"""

import argparse

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

MOST_CALLS = 5      # in a row, without an answer


@tool
def battery() -> str:
    """Return the charge of the robot's battery, in percent."""
    return '71'


@tool
def drive_to(place: str) -> str:
    """Drive to a place: dock, kitchen or door."""
    return f'arrived at the {place}'


TOOLS = {function.name: function for function in (battery, drive_to)}


def answer(llm: ChatOpenAI, question: str) -> str:
    """Return the model's answer; print the functions that it calls on the way."""
    bound, messages = llm.bind_tools(list(TOOLS.values())), [HumanMessage(question)]
    for _ in range(MOST_CALLS):
        reply = bound.invoke(messages)
        messages.append(reply)
        if not reply.tool_calls:
            return str(reply.content)
        for call in reply.tool_calls:
            result = TOOLS[call['name']].invoke(call)
            print(f'{call["name"]}({call["args"]}) -> {result.content}')
            messages.append(result)
    return f'no answer after {MOST_CALLS} calls'


def main() -> None:
    """Answer the question of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('question', nargs='?', default='How full is the battery?')
    parser.add_argument('--url', default='http://127.0.0.1:8000/v1', help='(default: %(default)s)')
    given = parser.parse_args()
    llm = ChatOpenAI(base_url=given.url, api_key='none', model='mace', temperature=0.0,
                     max_tokens=200)
    print(answer(llm, given.question))


if __name__ == '__main__':
    main()
