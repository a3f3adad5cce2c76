"""stories260K, a Llama of 260,032 parameters trained on TinyStories: calibrated on the first 40 stories of the excerpt,
reported by perplexity per token on the other 79.

The first 40 are read as one text, cut to windows of 256 tokens: so the model was trained, and no batch has padding.
"""

import torch
from torch import nn

import language
from autocompress.batches import Batch
from autocompress.hf import perplexity

CALIBRATION = 40
LENGTH = 256
BATCH = 4  # so that what is held out is one batch of five at least


def model() -> nn.Module:
    return language.stories260k()


def calibration() -> list[Batch]:
    text = torch.cat(language.stories()[:CALIBRATION])
    rows = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return [{"input_ids": part, "use_cache": False} for part in rows.split(BATCH)]


def evaluate(small: nn.Module) -> float:
    """Minus the perplexity, as higher is better."""
    return -perplexity(small, language.stories()[CALIBRATION:])
