# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A transformers model with a PEFT adapter attached, loaded as in PEFT's documentation."""

from __future__ import annotations

from typing import Any
import warnings

from peft import PeftModel
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(model: str, adapter: str, dtype: str, **options: Any) -> PeftModel:
    """Return the model in one folder with the adapter in another; PEFT gets ``options``."""
    logging.disable_progress_bar()
    warnings.filterwarnings('ignore', category=FutureWarning)    # raised by PEFT itself
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), use_safetensors=True)
    return PeftModel.from_pretrained(base, adapter, **options)
