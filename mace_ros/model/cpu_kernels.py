# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
A pass of decode rows as one compiled function, which several threads run together.

It is written in Numba. The threads take parts of each stage of the pass, such as some outputs of a
product, until none is left. Arrays of ``uint16`` hold bfloat16; each stage computes in fp32, and
rounds what it writes. All arrays are contiguous. Those of a model are given by their addresses, in
records: each has a type and a shape of its own.

Import this module only where Numba is installed. It keeps compiled code in files, and compiles
again when this file has changed; it does not look at the files that are imported here.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit
import numpy as np

from mace_ros.model.cpu_instructions import (
    dot_int4,
    dot_int4_of_four,
    fetch_add,
    GROUP,
    GROUP_BYTES,
    load,
    load_acquire,
    pointer,
    prefetch,
    store,
    yield_core,
)

# Identifies the content of cpu_instructions.py, so that this file changes whenever that one does.
# test/model/test_cpu_kernels.py knows the right value.
INSTRUCTIONS = 'cdc6f7111d6f2d65'

# A sum may be computed in any order, so in vectors. NaN and infinity stay what they are.
compiled = njit(cache=True, nogil=True, error_model='numpy',
                fastmath={'reassoc', 'contract', 'arcp', 'nsz'})

# Forms of a weight: in the model's dtype, in 8 bits, and in 4 bits (mace_ros.model.int4_rows).
DENSE, INT8, INT4 = range(3)
BLOCK = 16                      # tokens in a block of the KV cache
GATE_PARTS = 4                  # parts of a row of gates
TAKEN, DONE = range(2)          # counters of the parts of a stage
SPINS = 1000                    # polls of a waiting thread before it yields its core
# How far ahead weights are prefetched, and the size of a cache line, in bytes. Without prefetching,
# a core waits for memory at each output.
AHEAD, LINE = 2048, 64

# Records of what a pass reads from a model. An address is 0 where there is nothing.
NORM = np.dtype([('weight', np.uint64), ('eps', np.float32)], align=True)
PRODUCT = np.dtype([
    ('form', np.int64), ('weight', np.uint64), ('scales', np.uint64), ('bias', np.uint64),
    ('inputs', np.int64), ('outputs', np.int64),
    ('part', np.int64),                             # outputs that a thread takes at once
    ('a', np.uint64), ('b', np.uint64),             # fp32, [slots, width, inputs or outputs]
    ('width', np.int64)], align=True)
LAYER = np.dtype([
    ('input_norm', NORM), ('qkv', PRODUCT), ('query_norm', NORM), ('key_norm', NORM),
    ('rotates', np.int64),
    ('keys', np.uint64), ('values', np.uint64),     # [cache slots, KV heads, size]
    ('window', np.int64), ('scale', np.float32),
    ('out', PRODUCT), ('middle_norm', NORM), ('gate_and_up', PRODUCT), ('down', PRODUCT)],
    align=True)
MODEL = np.dtype([
    ('heads', np.int64), ('kv_heads', np.int64), ('size', np.int64),    # size: of a head
    ('cache_slots', np.int64), ('norm', NORM), ('head', PRODUCT)], align=True)


# -- memory ------------------------------------------------------------------------------


@compiled
def prefetch_lines(address: int, size: int) -> None:
    """Prefetch ``size`` bytes from an address on."""
    for i in range(0, size, LINE):
        prefetch(address + np.uint64(i))


@compiled
def new_scratch(layers: np.ndarray, model: Any, lengths: np.ndarray) -> Any:
    """
    Return memory for what a thread computes within a stage.

    It is allocated before the thread takes a part: one that failed then would leave the others
    waiting for the part.
    """
    rows, inputs, width, part = len(lengths), model.head.inputs, 0, 4
    for i in range(len(layers)):
        layer = layers[i]
        for product in (layer.qkv, layer.out, layer.gate_and_up, layer.down):
            inputs, width = max(inputs, product.inputs), max(width, product.width)
            part = max(part, product.part)      # the head has no adapter
    fours, together = (1, 1) if rows == 1 else (-(-rows // 4), 4)
    groups, heads = inputs // GROUP, model.heads // model.kv_heads
    of_products = (
        np.empty((rows, inputs), np.float32),                   # exact
        np.empty((rows, width), np.float32),                    # low
        np.empty((fours, groups, together, GROUP), np.float32),    # pairs
        np.empty((fours, groups, together), np.float32),        # sums
        np.empty(part, np.float32))                             # results
    of_attention = (
        np.empty((heads, model.size), np.float32),              # queries
        np.empty((heads, lengths.max()), np.float32),           # scores
        np.empty((heads, model.size), np.float32),              # sums
        np.empty(model.size, np.float32))                       # a key or a value
    return of_products, of_attention


# -- work that threads share -------------------------------------------------------------


@compiled
def take(counters: np.ndarray, stage: int) -> int:
    """Return the number of a part of a stage that no other thread has taken."""
    return fetch_add(counters[TAKEN], stage, 1)


@compiled
def finish_and_take(counters: np.ndarray, stage: int) -> int:
    """Return the number of another part, after one is done."""
    fetch_add(counters[DONE], stage, 1)
    return take(counters, stage)


@compiled
def wait(counters: np.ndarray, stage: int, count: int) -> None:
    """Wait until all ``count`` parts of a stage are done."""
    spins = 0
    while load_acquire(counters[DONE], stage) < count:
        spins += 1
        if spins > SPINS:
            yield_core()


# -- products ----------------------------------------------------------------------------


@compiled
def multiply(y: np.ndarray, x: np.ndarray, product: Any, slots: np.ndarray, scratch: Any,
             counters: np.ndarray, stage: int) -> None:
    """
    Multiply the rows of ``x`` with a weight, each under the adapter in its slot.

    Of each row of ``x``, the first values are the inputs; the outputs are the first of ``y``.
    """
    exact, low, pairs, sums, results = scratch
    count = -(-product.outputs // product.part)
    part = take(counters, stage)
    if part < count:        # else the model's memory may be gone, if this thread was late
        for row in range(len(slots)):
            for i in range(product.inputs):
                exact[row, i] = load(x[row], i)
        multiply_with_a(low, exact, product, slots)
        if product.form == INT4:
            pair_inputs(pairs, sums, exact, product.inputs // GROUP)
    while part < count:
        first = part * product.part
        last = min(first + product.part, product.outputs)
        shape = product.outputs, product.inputs
        if product.form == INT4:
            multiply_int4(y, pairs, sums, results, product, len(slots), first, last)
        elif product.form == INT8:
            weights = carray(pointer(product.weight), shape, np.int8)
            multiply_part(y, x, exact, weights, product, first, last)
        else:
            dense = carray(pointer(product.weight), shape, x.dtype)
            multiply_part(y, x, exact, dense, product, first, last)
        for row in range(len(slots)):
            if product.bias != 0:
                bias = carray(pointer(product.bias), product.outputs, x.dtype)
                for i in range(first, last):
                    store(y[row], i, load(y[row], i) + load(bias, i))
            if slots[row] != 0 and product.width > 0:
                add_update(y[row], low[row], results, product, slots[row], first, last)
        part = finish_and_take(counters, stage)
    wait(counters, stage, count)


@compiled
def multiply_part(y: np.ndarray, x: np.ndarray, exact: np.ndarray, weights: np.ndarray,
                  product: Any, first: int, last: int) -> None:
    """
    Compute some outputs of a weight that is not in 4 bits, for the inputs ``exact``.

    It may have a scale for each output. The dtype of scales is that of ``x``.
    """
    size = product.inputs * weights.itemsize
    scales = carray(pointer(product.scales), product.outputs, x.dtype)
    for output in range(first, last):
        prefetch_lines(product.weight + np.uint64(output * size + AHEAD), size)
        scale = load(scales, output) if product.scales != 0 else np.float32(1)
        for row in range(len(exact)):
            total = np.float32(0)
            for i in range(product.inputs):
                total += load(weights[output], i) * exact[row, i]
            store(y[row], output, total * scale)


@compiled
def multiply_int4(y: np.ndarray, pairs: np.ndarray, sums: np.ndarray, results: np.ndarray,
                  product: Any, rows: int, first: int, last: int) -> None:
    """Compute some outputs of a weight in 4 bits; see :func:`pair_inputs`."""
    groups = product.inputs // GROUP
    size = groups * GROUP_BYTES
    for output in range(first, last):
        weights = product.weight + np.uint64(output * size)
        prefetch_lines(weights + np.uint64(AHEAD), size)
        for four in range(len(pairs)):
            addresses = (
                np.uint64(pairs[four].ctypes.data), np.uint64(sums[four].ctypes.data),
                np.uint64(results.ctypes.data))
            if rows == 1:
                dot_int4(weights, *addresses, groups)
            else:
                dot_int4_of_four(weights, *addresses, groups)
            for i in range(min(4, rows - 4 * four)):
                store(y[4 * four + i], output, results[i])


@compiled
def pair_inputs(pairs: np.ndarray, sums: np.ndarray, exact: np.ndarray, groups: int) -> None:
    """
    Write inputs in the form for products with weights in 4 bits, and the sums of their groups.

    A byte holds the weights of two inputs: ``low + 16 * high``. It is multiplied as a whole with a
    16th of the second input, and ``low`` with the first one less that 16th. A single row comes
    alone, and others come in fours: ``[fours, groups, rows, GROUP]``.
    """
    together = pairs.shape[2]
    pairs[:] = 0
    sums[:] = 0
    for row in range(len(exact)):
        four, i = divmod(row, together)
        for group in range(groups):
            for pair in range(GROUP // 2):
                first = exact[row, group * GROUP + 2 * pair]
                second = exact[row, group * GROUP + 2 * pair + 1]
                pairs[four, group, i, pair] = first - second / np.float32(16)
                pairs[four, group, i, GROUP // 2 + pair] = second / np.float32(16)
                sums[four, group, i] += first + second


@compiled
def multiply_with_a(low: np.ndarray, exact: np.ndarray, product: Any, slots: np.ndarray) -> None:
    """Multiply each row with A of its adapter."""
    for row in range(len(slots)):
        slot = slots[row]
        a = carray(pointer(product.a), (slot + 1, product.width, product.inputs), np.float32)
        for k in range(product.width if slot != 0 else 0):
            total = np.float32(0)
            for i in range(product.inputs):
                total += exact[row, i] * a[slot, k, i]
            low[row, k] = total


@compiled
def add_update(y: np.ndarray, low: np.ndarray, update: np.ndarray, product: Any, slot: int,
               first: int, last: int) -> None:
    """Add the update by the adapter in a slot to some outputs of a row."""
    b = carray(pointer(product.b), (slot + 1, product.width, product.outputs), np.float32)
    update[:last - first] = 0
    for k in range(product.width):
        for i in range(last - first):
            update[i] += low[k] * b[slot, k, first + i]
    for i in range(last - first):
        store(y, first + i, load(y, first + i) + update[i])


# -- norms and gates ---------------------------------------------------------------------


@compiled
def normalize_rows(x: np.ndarray, hidden: np.ndarray, y: np.ndarray, adds: bool, norm: Any,
                   counters: np.ndarray, stage: int) -> None:
    """Normalize the rows of ``hidden`` to ``x``, after adding the first values of ``y``."""
    row = take(counters, stage)
    while row < len(hidden):
        for i in range(hidden.shape[1] if adds else 0):
            store(hidden[row], i, load(hidden[row], i) + load(y[row], i))
        normalize(x[row], hidden[row], norm)
        row = finish_and_take(counters, stage)
    wait(counters, stage, len(hidden))


@compiled
def normalize(out: np.ndarray, x: np.ndarray, norm: Any) -> None:
    """Divide the vector ``x`` by its root mean square, and multiply it by the norm's weight."""
    weight = carray(pointer(norm.weight), len(x), x.dtype)
    squares = np.float32(0)
    for i in range(len(x)):
        squares += load(x, i) * load(x, i)
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + norm.eps)
    for i in range(len(x)):
        store(out, i, load(x, i) * factor * load(weight, i))


@compiled
def multiply_gates(out: np.ndarray, y: np.ndarray, counters: np.ndarray, stage: int) -> None:
    """Multiply SiLU of the first values of each row of ``y`` by as many that follow."""
    count, width = len(out) * GATE_PARTS, out.shape[1]
    part = take(counters, stage)
    while part < count:
        row, place = divmod(part, GATE_PARTS)
        for i in range(place * width // GATE_PARTS, (place + 1) * width // GATE_PARTS):
            gate = load(y[row], i)
            silu = gate / (np.float32(1) + np.exp(-gate))
            store(out[row], i, silu * load(y[row], width + i))
        part = finish_and_take(counters, stage)
    wait(counters, stage, count)


# -- attention ---------------------------------------------------------------------------


@compiled
def attend_rows(out: np.ndarray, y: np.ndarray, layer: Any, model: Any, cos: np.ndarray,
                sin: np.ndarray, tables: np.ndarray, lengths: np.ndarray, scratch: Any,
                counters: np.ndarray, stage: int) -> None:
    """
    Attend with each row of ``y``, after its keys and values are written to the cache.

    A row of ``y`` holds heads of queries, keys and values, and changes. The heads that share keys
    and values are a part.
    """
    shape = model.cache_slots, model.kv_heads, model.size
    keys = carray(pointer(layer.keys), shape, y.dtype)
    values = carray(pointer(layer.values), shape, y.dtype)
    width = model.heads // model.kv_heads * model.size      # of the queries of a part
    count = len(out) * model.kv_heads
    part = take(counters, stage)
    while part < count:
        row, kv_head = divmod(part, model.kv_heads)
        key = (model.heads + kv_head) * model.size
        value = key + model.kv_heads * model.size
        write_cached(
            keys, values, kv_head, y[row, key:key + model.size], y[row, value:value + model.size],
            layer, cos[row], sin[row], tables[row], lengths[row])
        own = slice(kv_head * width, (kv_head + 1) * width)
        attend(out[row, own], y[row, own], keys, values, kv_head, layer, cos[row], sin[row],
               tables[row], lengths[row], scratch)
        part = finish_and_take(counters, stage)
    wait(counters, stage, count)


@compiled
def write_cached(keys: np.ndarray, values: np.ndarray, kv_head: int, key: np.ndarray,
                 value: np.ndarray, layer: Any, cos: np.ndarray, sin: np.ndarray,
                 table: np.ndarray, length: int) -> None:
    """Write a key and a value of the last of the ``length`` tokens in a table of KV blocks."""
    if layer.key_norm.weight != 0:
        normalize(key, key, layer.key_norm)
    if layer.rotates:
        rotate(key, cos, sin)
    slot = table[(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK
    for i in range(len(key)):
        keys[slot, kv_head, i], values[slot, kv_head, i] = key[i], value[i]


@compiled
def rotate(head: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """Rotate the first values of a head, each of their first half with one of their second."""
    half = len(cos) // 2
    for i in range(half):
        first, second = load(head, i), load(head, i + half)
        store(head, i, first * load(cos, i) - second * load(sin, i))
        store(head, i + half, second * load(cos, i + half) + first * load(sin, i + half))


@compiled
def attend(out: np.ndarray, y: np.ndarray, keys: np.ndarray, values: np.ndarray, kv_head: int,
           layer: Any, cos: np.ndarray, sin: np.ndarray, table: np.ndarray, length: int,
           scratch: Any) -> None:
    """Attend with some heads to the last of the ``length`` tokens in a table of KV blocks."""
    queries, scores, sums, cached = scratch
    heads, size = queries.shape
    first = max(length - layer.window, 0)
    for head in range(heads):
        own = y[head * size:(head + 1) * size]
        if layer.query_norm.weight != 0:
            normalize(own, own, layer.query_norm)
        if layer.rotates:
            rotate(own, cos, sin)
        for i in range(size):
            queries[head, i] = load(own, i) * layer.scale
    for t in range(first, length):
        read_cached(cached, keys, kv_head, table, t)
        for head in range(heads):
            score = np.float32(0)
            for i in range(size):
                score += queries[head, i] * cached[i]
            scores[head, t] = score
    for head in range(heads):
        softmax(scores[head, first:length])
    sums[:] = 0
    for t in range(first, length):
        read_cached(cached, values, kv_head, table, t)
        for head in range(heads):
            weight = scores[head, t]
            for i in range(size):
                sums[head, i] += weight * cached[i]
    for head in range(heads):
        for i in range(size):
            store(out, head * size + i, sums[head, i])


@compiled
def read_cached(out: np.ndarray, cache: np.ndarray, kv_head: int, table: np.ndarray,
                t: int) -> None:
    """Read a key or a value of token ``t``, and prefetch that of the token a block later."""
    block, place = divmod(t, BLOCK)
    if block + 1 < len(table):
        after = cache[table[block + 1] * BLOCK + place, kv_head]
        prefetch_lines(np.uint64(after.ctypes.data), len(after) * after.itemsize)
    own = cache[table[block] * BLOCK + place, kv_head]
    for i in range(len(out)):
        out[i] = load(own, i)


@compiled
def softmax(scores: np.ndarray) -> None:
    """Replace scores by their softmax."""
    largest, total = scores[0], np.float32(0)
    for i in range(len(scores)):
        largest = max(largest, scores[i])
    for i in range(len(scores)):
        scores[i] = np.exp(scores[i] - largest)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total


# -- the pass ----------------------------------------------------------------------------


@compiled
def run_pass(logits: np.ndarray, hidden: np.ndarray, buffers: Any, cos: np.ndarray,
             sin: np.ndarray, tables: np.ndarray, lengths: np.ndarray, slots: np.ndarray,
             layers: np.ndarray, models: np.ndarray, counters: np.ndarray) -> None:
    """
    Compute the logits of decode rows; each of several threads calls this with the same arguments.

    A thread that begins after the others are done changes nothing, and reads nothing of the model.

    - ``logits``: ``[rows, vocabulary]``, in fp32.
    - ``hidden``: the embeddings, ``[rows, width]``; they are overwritten.
    - ``buffers``: what norms, products, attention and gates write; each is ``[rows, values]``.
    - ``cos``, ``sin``: ``[rows, rotated values of a head]``.
    - ``tables``, ``lengths``: the KV blocks of each row, and its tokens in them, the new one
      included.
    - ``slots``: the adapter slot of each row; 0 is the base model's.
    - ``layers``, ``models``: a :data:`LAYER` for each layer, and one :data:`MODEL`.
    - ``counters``: zeros, ``[2, stages]``; see :func:`stages`.
    """
    x, y, attended, gated = buffers
    model, stage = models[0], 0
    of_products, of_attention = new_scratch(layers, model, lengths)
    normalize_rows(x, hidden, y, False, layers[0].input_norm, counters, stage)
    for i in range(len(layers)):
        layer = layers[i]
        multiply(y, x, layer.qkv, slots, of_products, counters, stage + 1)
        attend_rows(attended, y, layer, model, cos, sin, tables, lengths, of_attention, counters,
                    stage + 2)
        multiply(y, attended, layer.out, slots, of_products, counters, stage + 3)
        normalize_rows(x, hidden, y, True, layer.middle_norm, counters, stage + 4)
        multiply(y, x, layer.gate_and_up, slots, of_products, counters, stage + 5)
        multiply_gates(gated, y, counters, stage + 6)
        multiply(y, gated, layer.down, slots, of_products, counters, stage + 7)
        norm = layers[i + 1].input_norm if i + 1 < len(layers) else model.norm
        normalize_rows(x, hidden, y, True, norm, counters, stage + 8)
        stage += 8
    multiply(logits, x, model.head, slots, of_products, counters, stage + 1)


def stages(layers: int) -> int:
    """Return the number of stages of a pass."""
    return 8 * layers + 2
