# Copyright 2026 The mace_ros authors
# SPDX-License-Identifier: Apache-2.0
"""A model of transformers with a PEFT adapter attached, as its users load it."""

from __future__ import annotations

from typing import Any
import warnings

from peft import PeftModel
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(model: str, adapter: str, dtype: str, **options: Any) -> PeftModel:
    """Return the model in a folder with the adapter in another one; ``options`` are PEFT's."""
    logging.disable_progress_bar()
    warnings.filterwarnings('ignore', category=FutureWarning)    # of PEFT's own calls
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), use_safetensors=True)
    return PeftModel.from_pretrained(base, adapter, **options)
