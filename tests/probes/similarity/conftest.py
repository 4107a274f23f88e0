"""Maps of sequences of unequal length, alone and as a padded batch."""

import pytest
import torch

from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.run import Run

LENGTHS = (9, 14, 11)


def softmax_map(seed, lengths, width, heads=3):
    """Causal softmax over left-padded sequences; queries and keys of a sequence do not depend on its place in the batch."""
    q, k = torch.zeros(len(lengths), heads, width, 4), torch.zeros(len(lengths), heads, width, 4)
    real = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * seed + length)
        q[row, :, width - length :] = 2 * torch.randn(heads, length, 4, generator=generator)
        k[row, :, width - length :] = torch.randn(heads, length, 4, generator=generator)
        real[row, width - length :] = True
    q[~real[:, None].expand(q.shape[:3])] = 3.0  # what padding holds must not matter
    return SoftmaxMap(q.double(), k.double(), mask=Mask(causal=True, keys=real)), real


def run_of(lengths, width=None, layers=3, seed=0, acts=None):
    width = width or max(lengths)
    maps, real = {}, None
    for layer in range(layers):
        maps[layer], real = softmax_map(seed + layer, lengths, width)
    return Run(Tokens(torch.zeros(len(lengths), width, dtype=torch.int64), real), maps=maps, acts=acts or {})


@pytest.fixture
def padded():
    return run_of(LENGTHS)


@pytest.fixture
def alone():
    return [run_of((length,)) for length in LENGTHS]


@pytest.fixture
def dense():
    """A map from weights."""
    return lambda weights, **options: AttentionMap.from_dense(torch.as_tensor(weights, dtype=torch.float64), **options)
