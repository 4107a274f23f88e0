"""Radial energy of maps: planted waves, diagonals, Parseval, padding and blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import Refused
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.structure.map_frequencies import map_frequencies, radial_energy


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(0, 99))
def test_energies_add_up_and_are_those_of_a_literal_sum(queries, keys, seed):
    image = torch.randn(queries, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = radial_energy(image)
    torch.testing.assert_close(got.sum(), (image - image.mean()).square().sum(), atol=1e-9, rtol=1e-9)
    want = [0.0] * len(got)
    q, k = torch.arange(queries), torch.arange(keys)
    for u in range(queries):
        for v in range(keys):
            phase = -2 * math.pi * (u * q[:, None] / queries + v * k / keys)
            power = float(
                ((image - image.mean()) * torch.complex(phase.cos(), phase.sin()).to(torch.complex128)).sum().abs()
            )
            radius = math.hypot(min(u, queries - u), min(v, keys - v))
            want[int(math.log2(max(radius, 1)))] += power**2 / (queries * keys)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cycles", "octave"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_a_planted_wave_lies_in_its_octave(cycles, octave):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(32, dtype=torch.float64) / 32)
    rows = ((1 + 0.5 * wave) / 32).expand(1, 1, 32, 32)
    found = map_frequencies(AttentionMap.from_dense(rows.contiguous(), offset=0))
    shares = [float(found.values[f"from_{2**i}"][0]) for i in range(5)]
    assert shares == pytest.approx([float(i == octave) for i in range(5)], abs=1e-9)
    assert float(found.values["variance"][0]) == pytest.approx((0.5 / 32) ** 2 / 2)


def test_the_identity_spreads_over_its_frequencies_evenly():
    """n - 1 frequencies f_q = -f_k besides the mean, of radius sqrt(2) |f|."""
    n = 16
    found = map_frequencies(AttentionMap.from_dense(torch.eye(n, dtype=torch.float64)[None, None], offset=0))
    counts = [0] * 4
    for f in range(1, n):
        counts[int(math.log2(math.sqrt(2) * min(f, n - f)))] += 1
    assert [float(found.values[f"from_{2**i}"][0]) for i in range(4)] == pytest.approx([c / (n - 1) for c in counts])
    assert float(found.values["variance"][0]) == pytest.approx((1 / n) * (1 - 1 / n))


def test_equal_weights_have_no_frequencies_and_long_maps_are_refused():
    found = map_frequencies(AttentionMap.from_dense(torch.full((1, 2, 6, 6), 1 / 6), offset=0))
    assert bool(found.values["from_1"][0].isnan().all())
    assert found.values["variance"][0].tolist() == [0, 0]
    assert "equal weights" in found.undefined["0"]
    long = AttentionMap.from_dense(torch.full((1, 1, 1, 3000), 1 / 3000))
    with pytest.raises(Refused, match="size="):
        map_frequencies(long)
    assert map_frequencies(long, size=1500).layers == (0,)


def test_a_padded_batch_is_its_texts_and_blocks_are_sums():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 11, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    keys = torch.arange(11) >= torch.tensor([[0], [4]])
    both = map_frequencies(SoftmaxMap(q, k, mask=Mask(causal=True, keys=keys)))
    alone = [
        map_frequencies(SoftmaxMap(q[i : i + 1, :, s:], k[i : i + 1, :, s:], mask=Mask(causal=True)))
        for i, s in enumerate((0, 4))
    ]
    for name in ("from_1", "from_2", "variance"):
        want = torch.stack([one.values[name][0] for one in alone]).mean(0)
        torch.testing.assert_close(both.values[name][0], want)
    for name in ("from_1", "from_2"):
        torch.testing.assert_close(both.null[name][0], torch.stack([one.null[name][0] for one in alone]).mean(0))
    rows = random_rows(1, 2, 10)
    blocks = map_frequencies(AttentionMap.from_dense(rows), size=3)
    sums = torch.zeros(2, 4, 4, dtype=torch.float64)
    for i in range(10):
        for j in range(10):
            sums[:, i // 3, j // 3] += rows[0, :, i, j]
    want = radial_energy(sums)
    torch.testing.assert_close(blocks.values["from_1"][0], want[:, 0] / want.sum(-1))


def test_a_column_spreads_over_the_frequencies_of_keys_alone():
    sink = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    sink[..., 3] = 1.0
    found = map_frequencies(AttentionMap.from_dense(sink, offset=0))
    counts = [0] * 4
    for f in range(1, 16):
        counts[int(math.log2(min(f, 16 - f)))] += 1
    assert [float(found.values[f"from_{2**i}"][0]) for i in range(4)] == pytest.approx([c / 15 for c in counts])
