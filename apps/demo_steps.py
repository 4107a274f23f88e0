"""The steps of the demo. Each takes the shared work, saves what it finds and says it in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import workbench as wb
from workbench.apps.demo import GATED, SOFTMAX, Work
from workbench.apps.sentences import compared_lines, head_lines, head_name, sink_lines
from workbench.apps.terminal import percent, visible
from workbench.errors import WorkbenchError
from workbench.probes.atlas import Atlas, atlas, tile

if TYPE_CHECKING:
    from workbench.circuits import Circuit
    from workbench.models.protocol import Model
    from workbench.run import Run

SEED = 0
TEXTS, TEXT_TOKENS = 8, 95
RETRIEVAL_LENGTHS, DEPTHS = (96, 192, 384), 5
REMOVED = 8
EXAMPLES = 64
BLOCK = 64
NEEDLES = 3
TILE = (6, 14)
_WHERE = "the last queries on the keys around the last one's favourite"
KEPT_NODES, KEPT_EDGES = 10, 0.05
OPTIONS: dict[str, dict[str, Any]] = {"discrete-sae": {"pooling": "concat"}, "eap-ig": {}}


def steps(long: int) -> list[tuple[str, Callable[[Work], list[str]]]]:
    """Titles and functions, in order."""
    return [
        ("Capture", capture),
        ("Attention sinks: softmax and its gated twin", sinks),
        ("Induction and other known heads", heads),
        ("Retrieval heads", retrieval),
        ("A circuit by discrete sparse autoencoder", discrete_sae),
        ("A circuit by EAP-IG", eap_ig),
        ("How faithful the circuits are", faithfulness),
        (f"One input of {long:,} tokens, block by block", lambda work: long_input(work, long)),
    ]


def capture(work: Work) -> list[str]:
    """Load both models, capture one prompt, and check that capture leaves the logits alone."""
    for name in (SOFTMAX, GATED):
        work.models[name] = work.load(name)
    model = work.models[SOFTMAX]
    text = wb.task("ioi").build(seed=SEED, tokenizer=model.tokenizer, n=1).texts[0]
    lines = []
    for name, model in work.models.items():
        with torch.no_grad():
            run = model.run(text, maps=wb.capture(blocks=BLOCK, stats=("received", "entropy", "distance", "top1")))
            plain = model.run(text)
        difference = _difference(run, plain)
        shape = model.shape
        lines.append(
            f"{name}: {shape.layers} layers x {shape.heads} heads captured on {len(run.tokens.labels[0])} tokens; "
            f"max |delta logits| with capture on and off: {difference:g}"
        )
        work.facts[f"max |delta logits|, {name}"] = f"{difference:g}"
        if name == SOFTMAX:
            answer = _said(model, run)
            lines.append(f"{visible(text)} continues with {visible(answer)}")
            work.keep("prompt", atlas(run))
            lines += _answer_head(work, run, answer)
    return lines


def _said(model: Model, run: Run) -> str:
    """The token that the model gives the largest logit after the last one."""
    if run.logits is None:
        raise WorkbenchError(f"{model.name} has no output head, so it says nothing")
    return str(model.tokenizer.convert_ids_to_tokens(int(run.logits[0, -1].argmax())))


def _answer_head(work: Work, run: Run, answer: str) -> list[str]:
    """The head whose last token looks hardest at the word that the model says, drawn in full."""
    labels = run.tokens.labels[0]
    if answer not in labels:
        return []
    at, last = labels.index(answer), len(labels) - 1
    weight, layer, head = max(
        (float(row[0, h, 0, at]), int(layer), h)
        for layer, amap in run.maps.items()
        for row in [amap.rows(last, last + 1)]
        for h in range(row.shape[1])
    )
    work.keep(
        "prompt-head",
        tile(run, layer, head, slice(None), slice(None), "query down: where each token of the prompt looks"),
    )
    return [
        f"head {head_name(layer, head)} looks at it hardest: {visible(labels[last])} gives {percent(weight)} of its weight to "
        f"{visible(answer)} at position {at}"
    ]


def sinks(work: Work) -> list[str]:
    """Sinks of both models on the same texts."""
    from workbench.datasets.corpus import filler_text

    texts = [filler_text(SEED + i, TEXT_TOKENS) for i in range(TEXTS)]
    results = []
    for name in (SOFTMAX, GATED):
        model = _model(work, name)
        with torch.no_grad():
            run = model.run(texts, maps=wb.capture(stats=("received",)), logits=None)
        results.append(wb.sinks(run))
        work.keep(f"sinks-{name}", results[-1])
    work.found["sinks"] = results[0]
    return [
        *compared_lines((SOFTMAX, GATED), *results),
        *(f"{SOFTMAX}: {line}" for line in sink_lines(results[0])[:-1]),
    ]


def heads(work: Work) -> list[str]:
    """Previous-token, duplicate-token and induction heads on random repeats."""
    result = wb.head_scores(_model(work, SOFTMAX), seed=SEED)
    work.keep("heads", result)
    work.found["heads"] = result
    return head_lines(result)


def retrieval(work: Work) -> list[str]:
    """Retrieval heads, and what removing them does."""
    from workbench.apps.sentences import masking_lines, retrieval_lines
    from workbench.probes.retrieval.masking import masking

    model = _model(work, SOFTMAX)
    result = wb.retrieval_heads(model, lengths=RETRIEVAL_LENGTHS, depths=DEPTHS, seed=SEED, progress=work.tick)
    work.keep("retrieval", result)
    work.found["retrieval"] = result
    lines = retrieval_lines(result)
    if result.heads():
        recall = result.grid().groupby("length")["recall"].mean()
        easy = [int(length) for length in recall.index[recall >= 0.8]] or [min(RETRIEVAL_LENGTHS)]
        removed = masking(model, result, top=min(REMOVED, len(result.heads())), lengths=easy)
        work.keep("retrieval-masking", removed)
        lines += masking_lines(removed)
    return lines


def discrete_sae(work: Work) -> list[str]:
    """Heads whose codes only prompts with the behaviour use; the negatives have no repeated name."""
    return _circuit(work, "discrete-sae", corruption="abc")


def eap_ig(work: Work) -> list[str]:
    """Edges by integrated gradients; the counterfactual swaps the second subject for the indirect object."""
    return _circuit(work, "eap-ig", corruption="s2_io_flip")


def _circuit(work: Work, method: str, corruption: str) -> list[str]:
    model = _model(work, SOFTMAX)
    task = wb.task("ioi", corruption=corruption)
    pairs = task.build(seed=SEED, tokenizer=model.tokenizer, n=EXAMPLES)
    circuit = wb.find_circuit(model, pairs, method=method, **OPTIONS[method])
    scored = len(circuit.names)
    circuit = circuit.top(min(KEPT_NODES, scored) if circuit.level == "node" else round(KEPT_EDGES * scored))
    work.keep(f"circuit-{method}", circuit)
    work.found[method] = circuit
    said = "".join(f", {name}={value}" for name, value in OPTIONS[method].items())
    lines = [f"{method}{said} on IOI, {EXAMPLES} pairs, {scored:,} {circuit.level}s scored; {_strongest(circuit)}"]
    if "p" in circuit.columns:
        clear = int((circuit.columns["p"] < 0.05).sum())
        lines.append(f"{clear} of {scored} heads score more than 95% of shuffled labels would give them")
    return lines


def faithfulness(work: Work) -> list[str]:
    """Both circuits judged by the same rule, on other examples than they were found on."""
    model = _model(work, SOFTMAX)
    pairs = wb.task("ioi", split="test").build(seed=SEED, tokenizer=model.tokenizer, n=EXAMPLES)
    lines = []
    for method in ("discrete-sae", "eap-ig"):
        if method not in work.found:
            raise wb.WorkbenchError(f"there is no circuit by {method}: its step failed")
        circuit = work.found[method]
        result = wb.faithfulness(model, circuit, pairs)
        work.keep(f"faithfulness-{method}", result)
        lines.append(
            f"{method}: {len(circuit)} of {len(circuit.names):,} {circuit.level}s keep {percent(result.own)} of the behaviour; "
            f"CPR {result.cpr:.2f} (random {float(result.random_cpr.mean()):.2f}), "
            f"CMD {result.cmd:.2f} (random {float(result.random_cmd.mean()):.2f})"
        )
    return lines


def long_input(work: Work, tokens: int) -> list[str]:
    """Block maps of one long text with hidden facts, and a few exact tiles of it."""
    from workbench.datasets.corpus import needle_text

    model = _model(work, SOFTMAX)
    hay = needle_text(SEED, tokens=tokens, needles=NEEDLES)
    with torch.no_grad():
        run = model.run(
            hay.text,
            maps=wb.capture(blocks=BLOCK, reduce=("sum", "max"), stats=("received", "entropy", "distance")),
            logits="last",
        )
    result = atlas(run, BLOCK)
    work.keep("long", result)
    labels = run.tokens.labels[0]
    said = _said(model, run)
    right = hay.answer.strip()
    lines = [
        f"{len(labels):,} tokens, block maps of {BLOCK} x {BLOCK} tokens for {model.shape.layers * model.shape.heads} heads; "
        f"no N x N matrix was built",
        f"asked for the fact hidden at {percent(hay.facts[0].depth)} of the text, the model says {visible(said)} "
        f"(right: {visible(right)}); no text it was trained on was that long",
    ]
    for layer, head, why in _chosen(work, result):
        weight, key = run.maps[layer].rows(len(labels) - 1, len(labels))[0, head, 0].max(0)
        lo = max(0, min(int(key) - TILE[1] // 2, len(labels) - TILE[1]))
        part = tile(run, layer, head, slice(len(labels) - TILE[0], None), slice(lo, lo + TILE[1]), f"{why}: {_WHERE}")
        work.keep(f"tile-{layer}-{head}", part)
        lines.append(
            f"head {head_name(layer, head)} ({why}): the last token gives {percent(float(weight))} of its weight to "
            f"{visible(labels[int(key)])} at position {int(key):,}, {len(labels) - 1 - int(key):,} tokens back"
        )
    return lines


def _chosen(work: Work, long: Atlas) -> list[tuple[int, int, str]]:
    """Heads worth a close look: the strongest sink, the best retrieval head and the best induction head."""
    layer, head, _, token, share = long.strongest[0]
    sink = f"the strongest sink, {percent(share)} of its weight goes to {visible(token)}"
    found: dict[tuple[Any, int], str] = {(layer, head): sink}
    if "retrieval" in work.found:
        for best in work.found["retrieval"].heads()[:1]:
            found.setdefault((best.layer, best.head), "the best retrieval head")
    if "heads" in work.found and "induction" not in work.found["heads"].undefined:
        best = work.found["heads"].top("induction", 1)[0]
        found.setdefault((best.layer, best.head), "the best induction head")
    return [(layer, head, why) for (layer, head), why in found.items()]


def _model(work: Work, name: str) -> Model:
    if name not in work.models:
        raise wb.WorkbenchError(f"{name} was not loaded: the capture step failed")
    return work.models[name]


def _difference(one: Run, other: Run) -> float:
    assert one.logits is not None
    assert other.logits is not None
    return float((one.logits - other.logits).abs().max())


def _strongest(circuit: Circuit, n: int = 5) -> str:
    frame: Any = circuit.frame()
    best = frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index].head(n)
    if circuit.level == "node":
        return "strongest: " + ", ".join(f"{row.node} ({row.score:.2f})" for row in best.itertuples())
    named = [
        f"{r.source} to {r.target}{'' if r.channel == 'in' else f' [{r.channel}]'} ({r.score:.2f})"
        for r in best.itertuples()
    ]
    return "strongest: " + ", ".join(named)
