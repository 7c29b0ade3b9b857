# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""
The precision of base weights in tests, which must not depend on the CPU that they meet.

``model.weight_dtype: auto`` and ``load_model(dtype='auto')`` choose by the instructions of the
CPU. Tests replace both: nodes get :data:`WEIGHT_DTYPE`, and this process sees the CPU that
belongs to it.
"""

from __future__ import annotations

import os

# Instructions of a CPU, as torch.cpu.get_capabilities() names them.
WITHOUT_BFLOAT16 = {'avx2': True}
WITH_BFLOAT16 = {'avx2': True, 'avx512_bf16': True}

WEIGHT_DTYPE = os.environ.get('MACE_TEST_DTYPE') or 'float32'
CAPABILITIES = {
    'float32': WITHOUT_BFLOAT16, 'bfloat16': WITH_BFLOAT16, 'int8': WITH_BFLOAT16,
    'int4': WITH_BFLOAT16}[WEIGHT_DTYPE]
