"""A network that learned to look up values of keys: one head fetches them, and the answer needs that head alone."""

import pytest
import torch
from torch.nn import functional as F

import workbench as wb
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import Pairs

PAIRS, VOCAB, TOKENS, STEPS = 4, 64, 32, 260
CHANCE = 1 / PAIRS
"""A network that knows which values the text holds, and not whose they are, says one of them."""


def recalls(n, generator, tokens=TOKENS):
    """MQAR: ``k v`` of PAIRS keys, then the keys again in any order, each with its value; ids ``[n, tokens]``."""
    keys = torch.stack([torch.randperm(VOCAB // 2 - 1, generator=generator)[:PAIRS] + 1 for _ in range(n)])
    values = torch.stack([torch.randperm(VOCAB // 2, generator=generator)[:PAIRS] + VOCAB // 2 for _ in range(n)])
    again = torch.randint(PAIRS, (n, tokens // 2 - PAIRS), generator=generator)
    order = torch.cat([torch.arange(PAIRS).expand(n, -1), again], 1)
    return torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = NativeNet(NativeConfig(2, 1, 64, 32, VOCAB, positions="learned", context=TOKENS))
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    for _ in range(STEPS):
        ids = recalls(64, generator)
        logits = net(ids)[:, 2 * PAIRS :: 2]  # at the keys that come again
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 2 * PAIRS + 1 :: 2].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return NativeModel(net.eval(), name="recall")


def prompts(length, depth, seed):
    """The pairs, further look-ups up to ``length``, and a key: its value is the needle. The depth says which key."""
    n = 24
    ids = recalls(n, torch.Generator().manual_seed(10_000 + seed), length + 1)
    which = round(depth * (PAIRS - 1))
    ids[:, length - 1 : length + 1] = ids[:, 2 * which : 2 * which + 2]
    # Only the first mention of the value is the needle's: later ones are look-ups of others.
    rest = torch.arange(2 * PAIRS, length - 1, 2)
    clash = ids[:, rest] == ids[:, 2 * which, None]
    other = ids[:, 2 * ((which + 1) % PAIRS), None], ids[:, 2 * ((which + 1) % PAIRS) + 1, None]
    ids[:, rest] = torch.where(clash, other[0], ids[:, rest])
    ids[:, rest + 1] = torch.where(clash, other[1], ids[:, rest + 1])
    prompt, answer = ids[:, :length], ids[:, length:]
    span = torch.tensor([[2 * which + 1, 2 * which + 2]]).expand(n, -1)
    return Pairs(prompt, prompt, answer, -torch.ones_like(answer), torch.full((n,), length - 1), {"VALUE": span})


LENGTHS, DEPTHS = (9, 21), (0.0, 0.34, 1.0)


def test_the_head_that_fetches_is_found_and_the_answer_needs_it_alone(trained):
    found = wb.retrieval_heads(trained, LENGTHS, DEPTHS, prompts=prompts)
    assert found.grid()["recall"].min() > 0.9
    table = found.frame().set_index(["layer", "head"])
    assert table.loc[(1, 0), "score"] > 0.9
    assert table.loc[(0, 0), "score"] < CHANCE + 0.1  # it looks at one value or another
    assert table.loc[(1, 0), "low"] > max(table.loc[(1, 0), "null"], table.loc[(1, 0), "uniform"])
    curve = wb.masking_curve(trained, found, ks=(1,), outside=1, random=2, prompts=prompts).frame().iloc[0]
    assert curve["base"] > 0.9
    assert curve["ranked_high"] < CHANCE + 0.1
    assert curve["random_low"] > 0.8


def test_off_in_the_prompt_too_the_head_below_it_is_missed(trained):
    """It binds values to keys while the prompt is read: without it there is nothing to fetch by."""
    options = {"ks": (1,), "outside": 1, "random": 1, "lengths": LENGTHS, "depths": DEPTHS, "prompts": prompts}
    first, both = (
        wb.masking_curve(trained, [(1, 0), (0, 0)], whole=whole, **options).frame()["random"][0]
        for whole in (False, True)
    )
    assert both < first - 0.4


def test_a_network_that_never_fetches_has_no_score(trained):
    """Asked for what it did not learn, the key itself: undefined, with the reason, and never 0."""

    def keys(length, depth, seed):
        pairs = prompts(length, depth, seed)
        span = pairs.spans["VALUE"] - 1
        key = pairs.clean.gather(1, span[:, :1])
        return Pairs(pairs.clean, pairs.clean, key, pairs.wrong, pairs.position, {"VALUE": span})

    found = wb.retrieval_heads(trained, LENGTHS, DEPTHS, prompts=keys)
    assert found.score.isnan().all()
    assert found.frame()["score"].isna().all()
    assert "retrieved no needle in 144 trials" in found.reason
    assert found.heads(0.0) == []
