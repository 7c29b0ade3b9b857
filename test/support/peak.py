# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""The memory that operations take, on any device."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """While open, counts the bytes of all tensors that operations create, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: dict[int, weakref.ref[object]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs))
                  if isinstance(x, Tensor) and not x.is_mkldnn}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._add(storage, storage.nbytes())
        return out

    def _add(self, storage: object, size: int) -> None:
        key = id(storage)

        def gone(_: object) -> None:
            self.bytes -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.most = max(self.most, self.bytes)
