"""Findings in words: which head does what to which token. The command line, the demo and the report say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.apps.terminal import cell, percent, visible

if TYPE_CHECKING:
    from workbench.probes.ablation import AblationCurve
    from workbench.probes.heads.kinds import HeadScores
    from workbench.probes.heads.roles import HeadRoles
    from workbench.probes.retrieval.copying import RetrievalResult
    from workbench.probes.retrieval.masking import MaskingResult
    from workbench.probes.sinks.compare import SinkComparison
    from workbench.probes.sinks.scores import Sink, SinkResult


def head_name(layer: int | str, head: int) -> str:
    """``2.5`` for head 5 of layer 2, ``encoder.2.5`` in a stack."""
    return f"{layer}.{head}"


def sink_line(sink: Sink) -> str:
    """One head's favourite key, against what even attention would give it."""
    null = "" if math.isnan(sink.uniform) else f" (even attention would give {percent(sink.uniform)})"
    return (
        f"head {head_name(sink.layer, sink.head)} gives {percent(sink.share)} of its weight to "
        f"{visible(sink.token)} at position {sink.key}{null}"
    )


def sink_lines(result: SinkResult, top: int = 3) -> list[str]:
    """The strongest sinks and the two summary numbers of a text."""
    strongest = result.strongest()
    over = sum(sink.share > result.epsilon for sink in strongest)
    lines = [sink_line(sink) for sink in strongest[:top] if sink.share > result.epsilon]
    if not lines:
        best = f"; the largest: {sink_line(strongest[0])}" if strongest else ""
        lines = [f"no head gives more than {percent(result.epsilon)} of its weight to one token{best}"]
    elif over > top:
        lines.append(
            f"{over} of {len(strongest)} heads give more than {percent(result.epsilon)} of their weight to one token"
        )
    lines.append(
        f"attention to the first token: {percent(result.f_attn)} on average; "
        f"sink score {cell(result.sink_score)} (part of the heads whose first token gets more than {percent(result.epsilon)})"
    )
    return lines


def compared(first: SinkResult, second: SinkResult) -> pd.DataFrame:
    """Share of the first token per head in two models: ``layer, head, first, second, difference`` (second minus first).

    Heads that only one of the models has are undefined in the other.
    """
    tables = []
    for result in (first, second):
        rows = result.frame()
        tables.append(rows[rows["key"] == 0].set_index(["layer", "head"])["share"])
    frame = pd.concat(tables, axis=1, keys=["first", "second"]).reset_index()
    frame["difference"] = frame["second"] - frame["first"]
    return frame


def compared_lines(names: tuple[str, str], first: SinkResult, second: SinkResult) -> list[str]:
    """The same text in two models, in words."""
    return [
        f"attention to the first token: {percent(first.f_attn)} in {names[0]}, {percent(second.f_attn)} in {names[1]}",
        f"sink score: {cell(first.sink_score)} in {names[0]}, {cell(second.sink_score)} in {names[1]}",
        *furthest_lines(names, first, second),
    ]


def furthest_lines(names: tuple[str, str], first: SinkResult, second: SinkResult) -> list[str]:
    """The head whose share of the first token differs most; nothing if the models have no head in common."""
    both = compared(first, second).dropna(subset=["difference"])
    if not len(both):
        return []
    best = max(both.to_dict("records"), key=lambda row: abs(row["difference"]))
    return [
        f"largest difference: head {head_name(best['layer'], best['head'])} gives the first token "
        f"{percent(best['first'])} in {names[0]} and {percent(best['second'])} in {names[1]}"
    ]


PUBLISHED: dict[str, Any] = {
    "without": 0.467, "gated": 0.048, "map": "raw", "paper": "Qiu et al. 2025, arXiv 2505.06708",
}  # fmt: skip
"""F-Attn of a language model without and with a gate, of the attention inside the gate."""


def spread(row: Mapping[str, Any], name: str) -> str:
    """A number with its interval, ``0.134 [0.132, 0.136]``; without one where there is none."""
    if math.isnan(row[f"{name}_low"]):
        return cell(row[name])
    return f"{cell(row[name])} [{cell(row[f'{name}_low'])}, {cell(row[f'{name}_high'])}]"


def times(ratio: float, low: float, high: float) -> str:
    """``13.4 times less [13.2, 13.6]`` for a ratio of 13.4, ``1.1 times more`` for one of 1 / 1.1."""
    less = ratio >= 1
    ends = (low, high) if less else (1 / high, 1 / low)
    told = "" if math.isnan(low) else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
    return f"{ratio if less else 1 / ratio:.3g} times {'less' if less else 'more'}{told}"


def comparison_lines(found: SinkComparison) -> list[str]:
    """How many times less the second model gives the first token, the published number beside it, and what has no interval."""
    first, second = found.labels
    lines = []
    for kind in ("effective", "raw") if found.gated else ("both",):
        ratio, low, high = found.ratio("f_attn", kind)
        where = {"effective": "with the gate", "raw": "inside the gate", "both": "on average"}[kind]
        if math.isnan(ratio):
            lines.append(f"attention to the first token, {where}: none in {second}, so the ratio is undefined")
        elif ratio > 0:
            lines.append(
                f"attention to the first token, {where}: {times(ratio, low, high)} in {second} than in {first}"
            )
    if found.gated:
        ratio = PUBLISHED["without"] / PUBLISHED["gated"]
        lines.append(
            f"published, inside the gate: {PUBLISHED['without']} without and {PUBLISHED['gated']} with it, "
            f"{ratio:.2g} times less ({PUBLISHED['paper']})"
        )
    if max(found.sequences) < 2:
        lines.append("one text: no intervals; without --text and --file several generated texts are compared")
    return lines


_DOES = {
    "previous": "looks at the previous token",
    "duplicate": "looks at earlier copies of the token",
    "induction": "looks at what followed the token before",
}


def head_lines(result: HeadScores) -> list[str]:
    """The strongest head of every kind with its null, or why there is none; a weight below twice its null is no find."""
    lines = []
    for kind in result.kinds:
        if kind in result.undefined:
            lines.append(f"{kind}: undefined, {result.undefined[kind]}")
            continue
        best = result.top(kind, 1)[0]
        name, does = head_name(best.layer, best.head), _DOES.get(kind, kind)
        weights = f"{percent(best.value)} of its weight (null {percent(best.null)})"
        if best.value < 2 * best.null:
            lines.append(f"no head {does} much more than by chance; the nearest, {name}, with {weights}")
        else:
            lines.append(f"head {name} {does} with {weights}")
    return lines


_ROLE_DOES = {
    "first": "rest on the first token",
    "current": "look at the token itself",
    "positional": "go by position",
    "content": "go by content",
    "copying": "raise the logit of what they look at, by their weights",
    "suppressing": "lower the logit of what they look at, by their weights",
    "copy-suppression": "hold back tokens that the model is about to repeat",
}


def role_lines(roles: HeadRoles, shown: int = 4) -> list[str]:
    """How many heads have each role that ``head_lines`` does not tell, the strongest by name."""
    lines = []
    for role, does in _ROLE_DOES.items():
        found = roles.heads(role)
        if found:
            names = ", ".join(head_name(head.layer, head.head) for head in found[:shown])
            more = f" and {len(found) - shown} more" if len(found) > shown else ""
            count = "1 head" if len(found) == 1 else f"{len(found)} heads"
            lines.append(f"{role}: {count} {does if len(found) > 1 else _single(does)}: {names}{more}")
    return lines


def _single(does: str) -> str:
    """``look at`` as ``looks at``, of one head."""
    verb, rest = does.split(" ", 1)
    return f"{'goes' if verb == 'go' else verb + 's'} {rest}".replace("they look", "it looks").replace("their", "its")


def retrieval_lines(result: RetrievalResult) -> list[str]:
    """The retrieval heads with their nulls, and where the model finds the needle."""
    grid = result.grid()
    found = f"the model retrieves {percent(float(result.used.double().mean()))} of {len(result.used)} needles"
    worst = grid.sort_values("recall", kind="stable").iloc[0]
    if float(worst["recall"]) < 1:
        found += f", fewest at {int(worst['length']):,} tokens and depth {percent(float(worst['depth']))}"
    if result.reason:
        return [found, f"retrieval heads are undefined: {result.reason}"]
    heads = result.heads()
    if not heads:
        return [found, f"no head has a copy score of {result.threshold:g} or more"]
    named = [
        f"{head_name(h.layer, h.head)} (copies {percent(h.score)} of the needle, null {percent(h.null)})"
        for h in heads[:4]
    ]
    more = f" and {len(heads) - 4} more" if len(heads) > 4 else ""
    counts = result.counts().iloc[0]
    share = f"{percent(counts['share_above'])} of the heads ({percent(counts['null_above'])} by chance)"
    idle = f"{percent(counts['share_zero'])} copy nothing at all"
    return [
        found,
        f"{len(heads)} retrieval head{'s' * (len(heads) != 1)}: {', '.join(named)}{more}",
        f"{share} copy {percent(result.threshold)} of the needle or more; {idle}",
    ]


def masking_lines(result: MaskingResult) -> list[str]:
    """Accuracy without the best retrieval heads and without random ones."""
    frame = result.frame()
    mean = frame.groupby("condition")["accuracy"].mean()
    top = frame[frame["condition"] == "top"]["heads"].iloc[0]
    return [
        f"needle accuracy {percent(mean['none'])}; {percent(mean['top'])} without heads {top.replace(' ', ', ')}; "
        f"{percent(mean['random'])} without as many random heads"
    ]


def masking_curve_lines(result: AblationCurve) -> list[str]:
    """How many of the best heads it takes to lose the needles, beside random ones."""
    frame = result.frame()
    gone = frame[frame["ranked"] < result.base.mean().item() / 2]
    row = (gone if len(gone) else frame).iloc[0 if len(gone) else -1]
    heads = "the best head" if row["removed"] == 1 else f"the best {row['removed']:.0f} heads"
    return [
        f"without {heads} the model retrieves {percent(row['ranked'])} of a needle, without as many random ones "
        f"{percent(row['random'])} ({percent(row['random_low'])} to {percent(row['random_high'])}); with all of them "
        f"{percent(row['base'])}"
    ]
