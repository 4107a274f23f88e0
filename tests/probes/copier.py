"""A model that copies what stands between two marks, and prompts for it."""

import torch

from workbench.maps import AttentionMap
from workbench.models.protocol import Manifest, Shape, Tokens
from workbench.pairs import Pairs
from workbench.run import EMPTY, Maps, Provenance, Run
from workbench.sites import Site

START, END, ASK, STOP, VOCAB = 40, 41, 42, 49, 50
NEEDLE = (5, 6, 7)


class Tokenizer:
    eos_token_id = STOP


class Copier:
    """Writes the tokens between START and END after ASK, then STOP.

    Head 1.0 looks at the token about to be written and carries the answer: with its output at zero, all logits are equal.
    Head 1.1 looks one token further; 0.0 looks at the first token; 0.1 at the last query itself.
    """

    name = "copier"

    def __init__(self, fails=lambda prompt: False, says=lambda needle: [*needle, STOP], context=None):
        self.shape = Shape(2, 2, 2, 4, 1, VOCAB, context)
        self.tokenizer = Tokenizer()
        self.fails, self.says, self.captured = fails, says, []

    def tokens(self, texts):
        raise NotImplementedError

    def manifest(self):
        return Manifest(self.name, ())

    def run(self, tokens, read=(), edit=EMPTY, maps=None, *, logits="all", cache=None):
        ids = torch.cat([cache, tokens], 1) if torch.is_tensor(cache) else tokens
        before = ids.shape[1] - tokens.shape[1]
        rows = torch.zeros(2, len(ids), 2, tokens.shape[1], ids.shape[1])
        scores = torch.zeros(len(ids), 1, VOCAB)
        z = torch.ones(len(ids), tokens.shape[1], 2, 1)
        for site, change in edit.items():
            site = Site.parse(site)
            assert site.kind == "z"
            if site.layer == 1:
                z[:, :, site.head] = change(z[:, :, site.head])
        for b, line in enumerate(ids.tolist()):
            needle = list(range(line.index(START) + 1, line.index(END)))
            for q in range(tokens.shape[1]):
                now = line[: before + q + 1]
                step = len(now) - 1 - now.index(ASK) if ASK in now else 0
                at = needle[step % len(needle)]
                rows[0, b, 0, q, 0] = rows[0, b, 1, q, before + q] = 1
                rows[1, b, 0, q, at], rows[1, b, 1, q, at + 1] = 1, 1
            words = [0] * 9 if self.fails(line) else self.says([line[i] for i in needle])
            scores[b, 0, words[step] if step < len(words) else STOP] = 20 * z[b, -1, 0, 0]
        found = {}
        if maps is not None:
            assert maps.stats == ("top1",)
            self.captured.append((cache is not None, tokens.shape[1]))
            found = {layer: AttentionMap.from_dense(rows[layer], offset=before) for layer in range(2)}
        assert logits in ("last", None)
        return Run(
            Tokens.of(tokens), scores if logits else None, maps=Maps(found), provenance=Provenance(self.name), cache=ids
        )


def prompts(needle=NEEDLE, n=2, **changes):
    def build(length, depth, seed):
        room = length - len(needle) - 3
        at = round(depth * room)
        generator = torch.Generator().manual_seed(seed)
        hay = torch.randint(10, 30, (n, room), generator=generator)
        fact = torch.tensor([START, *needle, END]).expand(n, -1)
        clean = torch.cat([hay[:, :at], fact, hay[:, at:], torch.full((n, 1), ASK)], 1)
        spans = torch.tensor([[at + 1, at + 1 + len(needle)]] * n)
        answer = torch.tensor([sorted(set(needle))] * n)
        return Pairs(
            clean,
            clean,
            answer,
            torch.full((n, 1), -1),
            torch.full((n,), length - 1),
            {changes.get("span", "NEEDLE"): spans},
        )

    return build
