# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""Messages of other threads reach the engine in order, each one once."""

from __future__ import annotations

import threading

from mace_ros.api.events import Query
from mace_ros.engine.inbox import AbortQuery, Inbox, Message, SubmitQuery

SENDERS, EACH = 4, 500


def test_messages_of_each_thread_arrive_in_order() -> None:
    woken: list[None] = []
    inbox = Inbox(lambda: woken.append(None))

    def send(sender: int) -> None:
        for number in range(EACH):
            inbox.put(SubmitQuery(Query('Hm?', id=f'{sender} {number}'), 0.0)
                      if number % 2 else AbortQuery(f'{sender} {number}'))

    threads = [threading.Thread(target=send, args=(i,)) for i in range(SENDERS)]
    for thread in threads:
        thread.start()
    received: list[Message] = []
    while any(thread.is_alive() for thread in threads) or inbox:
        received += inbox.drain()
    for thread in threads:
        thread.join()
    received += inbox.drain()
    ids = [m.query.id if isinstance(m, SubmitQuery) else m.query_id for m in received]
    assert len(ids) == len(woken) == SENDERS * EACH
    for sender in range(SENDERS):
        assert [i for i in ids if i.startswith(f'{sender} ')] == [
            f'{sender} {number}' for number in range(EACH)]
    assert inbox.queries == 0


def test_queries_are_counted_while_they_wait() -> None:
    inbox = Inbox(lambda: None)
    inbox.put(SubmitQuery(Query('Hm?'), 0.0))
    inbox.put(AbortQuery('a'))
    inbox.put(SubmitQuery(Query('Hm?'), 0.0))
    assert inbox.queries == 2
    next(inbox.drain())
    assert inbox.queries == 1


def test_messages_that_arrive_while_others_are_handled_are_handled_too() -> None:
    inbox = Inbox(lambda: None)
    inbox.put(AbortQuery('first'))
    ids = []
    for message in inbox.drain():
        ids.append(message.query_id)
        if len(ids) == 1:
            inbox.put(AbortQuery('second'))
    assert ids == ['first', 'second'] and not inbox
