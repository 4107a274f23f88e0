"""Hand-compiled models: transformers whose every weight is written down, so that their circuits are known exactly.

``python -m workbench.datasets.models.compile`` writes the bundled ones. The residual stream is a direct sum of
blocks, one per variable (token, position, previous token, output, scratch); a head is a bilinear query-key form
between two blocks and a copy from one block to another. There is no norm and no MLP. Attention is ``hard`` (weights
are 0 or 1 up to 1e-8, gradients vanish) or ``soft``. ``rotate`` multiplies the residual stream by a random
orthogonal matrix, absorbed in all weights, so that no analysis can read the blocks off the axes. Decoy heads attend
to something and write into the scratch block, which nothing reads: their effect is exactly zero.

The models share the bundled tokenizer, so ``task("induction")`` and ``task("needle")`` run on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workbench.circuits import Circuit, circuit_graph, edge_name
from workbench.datasets.tokenizer import SPECIAL, base_vocabulary, word_tokenizer
from workbench.datasets.words import words
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

HERE = Path(__file__).resolve().parent
ATTENTION = {"hard": 20.0, "soft": 5.0}
"""Lead of the right key over every other key, in units of the softmax's argument."""
GAIN = 5.0
"""Logit of a token that is copied with weight 1."""
LAYERS, HEADS, POSITION, SCRATCH = 2, 4, 64, 8

Edge = tuple[str, str, str]


@dataclass(frozen=True)
class Head:
    """A head as four maps from block coordinates: ``query key value [D, r]`` and ``out [r, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


class Layout:
    """Names for the axes of the residual stream."""

    def __init__(self, **blocks: int) -> None:
        self.width = sum(blocks.values())
        self._at: dict[str, slice] = {}
        start = 0
        for name, size in blocks.items():
            self._at[name] = slice(start, start + size)
            start += size

    def pick(self, block: str, first: int = 0, count: int | None = None) -> Tensor:
        """The map ``[D, count]`` that reads ``count`` coordinates of a block."""
        span = range(self.width)[self._at[block]][first : None if count is None else first + count]
        return torch.eye(self.width)[:, span.start : span.stop]


def compile_induction(attention: str = "hard", *, rotate: int | None = None, context: int = 512) -> NativeModel:
    """A previous-token head ``a0.h1`` and an induction head ``a1.h2`` that finds its key through K-composition.

    a0.h1 copies the token before position p into the block ``before``. a1.h2 matches the current token with
    ``before`` of earlier positions and copies the token found there to the output. The words of ``words("symbols")``
    have orthogonal codes; all other tokens have random directions in the same space, so that the model continues any
    repeat. ``rotate`` is the seed of the rotation, none by default.
    """
    lead, symbols = _lead(attention), words("symbols")
    n = len(symbols)
    codes = one_hot(symbols)
    noise = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    others = (codes.sum(1) == 0) & torch.tensor([token not in SPECIAL for token in base_vocabulary()])
    codes[others] = (noise / noise.norm(dim=1, keepdim=True))[others]
    blocks = Layout(token=n, bos=1, always=1, position=POSITION, before=n, output=n, scratch=SCRATCH)
    table, shift, gap = positions(context)
    place, token = blocks.pick("position"), blocks.pick("token")
    heads = {
        (0, 1): Head(place @ shift(1) * (lead / gap), place, token, blocks.pick("before").T),
        (1, 2): Head(token * lead, blocks.pick("before"), token, blocks.pick("output").T),
        **_decoys(blocks, ((0, 0), (1, 0), (1, 3)), ((0, 2, 0), (0, 3, 0), (1, 1, 1)), shift, lead / gap),
    }
    mechanism = [
        ("input", "a0.h1", "q"),
        ("input", "a0.h1", "k"),
        ("input", "a0.h1", "v"),
        ("a0.h1", "a1.h2", "k"),
        ("input", "a1.h2", "q"),
        ("input", "a1.h2", "v"),
        ("a1.h2", "logits", "in"),
    ]
    active = [mechanism[i] for i in (2, 3, 5, 6)]
    return _assemble("compiled-induction", blocks, heads, codes, codes, table, mechanism, active, rotate)


def compile_needle(attention: str = "hard", *, rotate: int | None = None, context: int = 4096) -> NativeModel:
    """A retrieval head ``a1.h1`` that copies the value of the key a question asks for.

    In "The K box holds V." the value stands 3 tokens after its key, and in "... the K box? Answer:" the last token
    stands 4 after the key. a0.h0 copies the key 3 tokens back into ``owner``, a0.h2 the key 4 tokens back into
    ``asked``. a1.h1 matches ``asked`` with ``owner`` among value words and copies the value. Four further heads
    attend to ``<bos>`` or are inert.
    """
    lead, keys, values = _lead(attention), words("keys"), words("values")
    blocks = Layout(
        token=len(keys) + len(values),
        bos=1,
        always=1,
        position=POSITION,
        owner=len(keys),
        asked=len(keys),
        output=len(values),
        scratch=SCRATCH,
    )
    table, shift, gap = positions(context)
    place, key = blocks.pick("position"), blocks.pick("token", 0, len(keys))
    value, always = blocks.pick("token", len(keys)), blocks.pick("always")
    heads = {
        (0, 0): Head(place @ shift(3) * (lead / gap), place, key, blocks.pick("owner").T),
        (0, 2): Head(place @ shift(4) * (lead / gap), place, key, blocks.pick("asked").T),
        (1, 1): Head(
            torch.cat([blocks.pick("asked"), always], 1) * lead,
            torch.cat([blocks.pick("owner"), value.sum(1, keepdim=True)], 1),
            value,
            blocks.pick("output").T,
        ),
        **_decoys(blocks, ((0, 1), (1, 0), (1, 3)), ((0, 3, 0), (1, 2, 1)), shift, lead / gap),
    }
    mechanism = [("input", head, channel) for head in ("a0.h0", "a0.h2", "a1.h1") for channel in "qkv"]
    mechanism += [("a0.h2", "a1.h1", "q"), ("a0.h0", "a1.h1", "k"), ("a1.h1", "logits", "in")]
    active = [("input", "a1.h1", "v"), ("a1.h1", "logits", "in")]
    codes, written = one_hot([*keys, *values]), one_hot(values)
    return _assemble("compiled-needle", blocks, heads, codes, written, table, mechanism, active, rotate)


COMPILERS = {"compiled-induction": compile_induction, "compiled-needle": compile_needle}


def compiled(name: str, attention: str = "hard", *, rotate: int | None = None) -> NativeModel:
    """A hand-compiled model by name, built in memory; ``.ground_truth`` is its mechanism."""
    if name not in COMPILERS:
        raise UnknownName("compiled model", name, COMPILERS)
    return COMPILERS[name](attention, rotate=rotate)


def positions(context: int, width: int = POSITION, seed: int = 0) -> tuple[Tensor, Shift, float]:
    """Position codes ``[context, 64]`` of norm 1, the map that moves them back, and their gap.

    A code is 32 pairs (cos w p, sin w p) with random frequencies; the inner product of codes is 1 for equal
    positions and at most 1 - gap otherwise. ``code(p) @ shift(d) == code(p - d)``.
    """
    rates = torch.rand(width // 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * torch.pi
    angles = torch.arange(context, dtype=torch.float64)[:, None] * rates
    table = torch.cat([angles.cos(), angles.sin()], 1) / (width / 2) ** 0.5
    gap = 1 - float((table[1:] @ table[0]).max()) if context > 1 else 1.0
    if gap < 0.1:
        raise WorkbenchError(f"{context} positions are too many for codes of width {width}")
    return table.float(), Shift(rates), gap


@dataclass(frozen=True)
class Shift:
    """``Shift(rates)(d)`` is the ``[64, 64]`` rotation that takes the code of p to the code of p - d."""

    rates: Tensor

    def __call__(self, steps: int) -> Tensor:
        cos, sin = (self.rates * steps).cos().diag(), (self.rates * steps).sin().diag()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]).float()


def _lead(attention: str) -> float:
    if attention not in ATTENTION:
        raise UnknownName("attention", attention, ATTENTION)
    return ATTENTION[attention]


def _decoys(
    blocks: Layout,
    first: Sequence[tuple[int, int]],
    back: Sequence[tuple[int, int, int]],
    shift: Shift,
    sharp: float,
) -> dict[tuple[int, int], Head]:
    """Heads that attend to ``<bos>`` (``first``: layer, head) or some steps back (``back``: layer, head, steps),
    and a random part of what they see written into the scratch block."""
    tokens = blocks.pick("token")
    place, out = blocks.pick("position"), blocks.pick("scratch").T
    found = {}
    for layer, head in first:
        found[layer, head] = Head(blocks.pick("always") * 30, blocks.pick("bos"), _small(tokens, layer, head), out)
    for layer, head, steps in back:
        found[layer, head] = Head(place @ shift(steps) * sharp, place, _small(tokens, layer, head), out)
    return found


def _small(tokens: Tensor, layer: int, head: int) -> Tensor:
    noise = torch.randn(tokens.shape[1], SCRATCH, generator=torch.Generator().manual_seed(100 * layer + head))
    return tokens @ noise


def _assemble(
    name: str,
    blocks: Layout,
    heads: dict[tuple[int, int], Head],
    codes: Tensor,
    written: Tensor,
    table: Tensor,
    mechanism: Sequence[Edge],
    active: Sequence[Edge],
    rotate: int | None,
) -> NativeModel:
    """Weights from blocks. ``codes`` ``[V, token]`` is what the embedding writes, ``written`` ``[V, output]`` what the
    unembedding reads."""
    turn = torch.eye(blocks.width) if rotate is None else rotation(blocks.width, rotate)
    width = max(max(head.query.shape[1], head.value.shape[1]) for head in heads.values())
    net = NativeNet(
        NativeConfig(
            layers=LAYERS,
            heads=HEADS,
            width=blocks.width,
            head_width=width,
            vocab=len(codes),
            positions="learned",
            norm="none",
            context=len(table),
            scale=1.0,
        )
    )
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    bos = one_hot(["<bos>"])
    state["W_E"] = (codes @ blocks.pick("token").T + bos @ blocks.pick("bos").T + blocks.pick("always").T) @ turn
    state["W_pos"] = table @ blocks.pick("position").T @ turn
    state["W_U"] = turn.T @ blocks.pick("output") @ written.T * GAIN
    for (layer, index), head in heads.items():
        prefix = f"blocks.{layer}.attn."
        for weight, value in (("W_Q", head.query), ("W_K", head.key), ("W_V", head.value)):
            state[prefix + weight][index, :, : value.shape[1]] = turn.T @ value
        state[prefix + "W_O"][index, : len(head.out)] = head.out @ turn
    net.load_state_dict(state)
    truth = mechanism_circuit(name, mechanism, active)
    return NativeModel(net.eval().requires_grad_(False), word_tokenizer(base_vocabulary()), name=name, ground_truth=truth)


def one_hot(known: Sequence[str]) -> Tensor:
    """``[V, len(known)]``: row of each token of the vocabulary, zero for tokens that are not ``known``."""
    tokens = {token: i for i, token in enumerate(base_vocabulary())}
    table = torch.zeros(len(tokens), len(known))
    table[[tokens[word] for word in known], range(len(known))] = 1
    return table


def rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix ``[D, D]``, uniform over the group."""
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()


def mechanism_circuit(name: str, mechanism: Sequence[Edge], active: Sequence[Edge]) -> Circuit:
    """The truth over all edges of the graph, relative to the task's default corruption.

    ``kept`` (score 1): edges whose single patch has an effect. The column ``needed`` marks every edge that the
    computation uses, also those that carry what clean and corrupted prompts share, which no patching can see.
    """
    graph = circuit_graph(LAYERS, HEADS, mlp=False)
    circuit = Circuit.of("edge", graph.edges, [edge_name(*edge) for edge in active], method="compiled", model=name)
    marks = {edge_name(*edge) for edge in mechanism}
    flags = torch.tensor([edge in marks for edge in graph.edges])
    return Circuit("edge", circuit.names, circuit.scores, circuit.kept, circuit.provenance, {"needed": flags})


def write(name: str, folder: Path) -> Path:
    """Compile ``name`` and write its folder: config, weights (float16), tokenizer, ground truth and card."""
    model = compiled(name)
    model.save(folder, dtype=torch.float16)
    shutil.rmtree(folder / "ground_truth", ignore_errors=True)
    assert model.ground_truth is not None
    model.ground_truth.save(folder / "ground_truth")
    (folder / "card.md").write_text(_card(model))
    return folder


def _card(model: NativeModel) -> str:
    truth = model.ground_truth
    assert truth is not None
    needed = truth.columns["needed"].tolist()
    rows = "\n".join(
        f"| `{name}` | {'yes' if kept else 'no'} |"
        for name, kept, used in zip(truth.names, truth.kept.tolist(), needed, strict=True)
        if used
    )
    shape, task = model.shape, model.name.removeprefix("compiled-")
    doc = (COMPILERS[model.name].__doc__ or "").strip()
    about = "\n".join(line.strip() for line in doc.splitlines()).replace("``", "`")
    return f"""# {model.name}

{about}

Compiled, not trained: {shape.layers} layers, {shape.heads} heads of {shape.head_width}, width {shape.width}, no MLP, no norm,
learned positions up to {shape.context} tokens, hard attention. It solves `task("{task}")` with accuracy 1.

| edge that the computation needs | its single patch has an effect |
|-|-|
{rows}

`load("{model.name}").ground_truth` keeps the edges with an effect; its column `needed` marks all of the table. An edge without
an effect carries what clean and corrupted prompts share (positions, the query), which no patching can see. All other heads
are decoys: they write into a block that nothing reads.

Made by `python -m workbench.datasets.models.compile` in a few seconds. `compiled("{model.name}", "soft")` has soft attention,
`rotate=seed` a rotated residual stream.
"""


def main() -> None:
    for name in COMPILERS:
        folder = write(name, HERE / name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}  {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
