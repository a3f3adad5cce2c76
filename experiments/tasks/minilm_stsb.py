"""all-MiniLM-L6-v2, a sentence encoder: calibrated on WikiText-2 validation text, reported on the dev set of the STS
benchmark.

Mean pooling over tokens, unit length; the pooler, which that leaves unused, is not loaded. Windows of running text, all
of one length, stand for sentences, so that no batch has padding.
"""

import functools

import torch
from torch import nn
from transformers import AutoTokenizer, BertModel

from autocompress.batches import Batch
from autocompress.hf import mean_embedding, pretrained, window_batches, windows
from language import minilm_folder, spearman, wikitext

LENGTH = 64
SAMPLES = 512

evaluate, embedding = spearman, mean_embedding


def model() -> nn.Module:
    return pretrained(BertModel, minilm_folder(), add_pooling_layer=False)


def calibration(seed: int = 0) -> list[Batch]:
    found = text_windows()
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:SAMPLES]
    return window_batches(found[rows])


@functools.cache
def text_windows() -> torch.Tensor:
    return windows(AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True), wikitext(), LENGTH)
