"""Which heads write the answer out of the needle?

LOCOS (arXiv 2607.01002) scores what a head writes, not where it looks. While token y_t of the answer is written, key j adds

    phi[t, j, h] = A[t, j] * u[y_t]^T W_O^h v_j

to its logit through head h, along the direct path. A head retrieves if the needle adds more than as many other keys do:

    S = sum over the needle of phi  -  (|needle| / |elsewhere|) * sum elsewhere of phi,   mean over the answer's steps.

``attention`` is the same contrast of the attention weights alone, the baseline it is compared with. Decoding is greedy with a
key-value cache: a step sees one row of every map, and the values, which are linear in the tokens. How the final norm is
treated is said in ``direct_path``. Sums over all keys are checked against the head's own output at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.retrieval.direct_path import Norm, check_norm, norm_of, output_weights, unembeddings
from workbench.probes.retrieval.trials import by_position, needle_spans, windows_elsewhere
from workbench.probes.tables import HeadTable
from workbench.run import Provenance, Run
from workbench.sites import Site

MEASURES = ("contribution", "needle", "total", "attention")
_UNIT = {
    "contribution": "logit added by the needle beyond chance",
    "needle": "logit added by the needle",
    "total": "logit added by the head",
    "attention": "attention to the needle beyond chance",
}
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
UNSAID = "no token of the needle or of the answer was written in any trial, so that no step is the answer's"


@torch.no_grad()
def contributions(
    model: Model,
    pairs: Pairs | Sequence[Pairs],
    *,
    norm: str = "none",
    span: str | None = None,
    max_new_tokens: int = 1,
    cache: bool = True,
) -> HeadTable:
    """Logit contributions of the needle through every head: ``contribution`` S, ``needle`` (its first term), ``total`` (all
    keys) and ``attention`` (the contrast of the weights alone), mean over trials with 95% bootstrap intervals.

    ``pairs``: prompts of the needle test, one batch or several (lengths, depths). ``span``: which part counts as the needle,
    by default ``NEEDLE``. The answer's steps are those of the ``max_new_tokens`` greedy ones that write a token of the needle
    or an accepted answer; trials without one are left out, and all is NaN if none is left. The null of S and of ``attention``
    is their mean over all windows as long as the needle elsewhere in the prompt. ``cache=False`` is for models without a
    key-value cache. ``norm``: ``none`` (the published form) or ``frozen``, see ``direct_path``. Positive means the needle
    raises the logit. Refuses layers whose output is not their map times their values.
    """
    check_norm(norm)
    if max_new_tokens < 1:
        raise WorkbenchError(f"max_new_tokens is at least 1; got {max_new_tokens}")
    trials: list[Tensor] = []
    chance: list[Tensor] = []
    layers: tuple[int, ...] = ()
    provenance = Provenance("unknown")
    for part in by_position(pairs):
        found = _Steps(model, part, needle_spans(part, span), norm, cache).decode(max_new_tokens)
        layers, provenance = found.layers, found.provenance
        trials.append(found.mean(found.values))
        chance.append(found.mean(found.chance))
    values, nulls = torch.cat(trials, 0), torch.cat(chance, 0)  # [R, measures, L, H]
    silent = not bool(values.isfinite().any())

    def tables(numbers: Tensor) -> dict[str, dict[int | str, Tensor]]:
        return {name: dict(zip(layers, numbers[:, i].unbind(1), strict=True)) for i, name in enumerate(MEASURES)}

    return HeadTable.averaged(
        "Contribution of the needle to the answer",
        tables(values),
        _UNIT,
        null={name: part for name, part in tables(nulls).items() if name in ("contribution", "attention")},
        undefined=dict.fromkeys(MEASURES, UNSAID) if silent else {},
        provenance=provenance,
    )


class _Steps:
    """Greedy decoding of one batch of prompts of one length, and what each step gave: ``[steps][B, measures, L, H]``."""

    def __init__(self, model: Model, pairs: Pairs, spans: Tensor, norm: str, cache: bool) -> None:
        self.model, self.spans, self.cache, self.norm = model, spans, cache, norm
        self.prompt = pairs.clean[:, : int(pairs.position[0]) + 1]
        self.layers = tuple(range(model.shape.layers))
        wanted = [self.prompt[b, lo:hi].tolist() for b, (lo, hi) in enumerate(spans.tolist())]
        self.accepted = [{*row, *(a for a in pairs.answer[b].tolist() if a >= 0)} for b, row in enumerate(wanted)]
        self.values: list[Tensor] = []
        self.chance: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.v: dict[int, Tensor] = {}
        self.fitted: Norm | None = None
        self.provenance = Provenance("unknown")

    def mean(self, steps: list[Tensor]) -> Tensor:
        """Mean over the answer's steps, ``[B, measures, L, H]``; NaN for a trial without one."""
        counts = torch.stack(self.counts)  # [S, B]
        total = (torch.stack(steps) * counts[:, :, None, None, None]).sum(0)
        number = counts.sum(0)[:, None, None, None]
        return torch.where(number > 0, total / number.clamp(min=1), float("nan"))

    def decode(self, steps: int) -> _Steps:
        text = self.prompt
        state: Any = None
        if self.cache and text.shape[1] > 1:
            run = self._run(text[:, :-1], None, state=True)
            state = run.cache
            if state is None:
                raise Refused(f"{self.model.name} gave no key-value cache; call again with cache=False")
        elif self.cache:
            state = True
        end = getattr(self.model.tokenizer, "eos_token_id", None)
        going = torch.ones(len(text), dtype=torch.bool)
        for _ in range(steps):
            run = self._run(text[:, -1:] if self.cache else text, "last", state=state)
            state = run.cache if self.cache else None
            if run.logits is None:
                raise Refused(f"{self.model.name} gives no logits to contribute to")
            new = run.logits[:, -1].argmax(-1).cpu()
            going = going & (new != end) if end is not None else going
            self._score(run, new)
            said = torch.tensor(
                [token in accepted for token, accepted in zip(new.tolist(), self.accepted, strict=True)]
            )
            self.counts.append((said & going).double())
            text = torch.cat([text, new[:, None].to(text)], 1)
            if not going.any():
                break
        return self

    def _run(self, ids: Tensor, logits: str | None, state: Any) -> Run:
        reads = [Site(kind, layer) for layer in self.layers for kind in ("v", "z")]
        if self.norm == "frozen":
            reads.append(Site("resid_post", self.layers[-1]))
        maps = capture(keep=True) if logits is not None else None
        run = self.model.run(ids, read=reads if maps is not None else [s for s in reads if s.kind != "z"], maps=maps,
                             logits=logits, cache=state)  # fmt: skip
        for layer in self.layers:
            new = run.acts[Site("v", layer)].transpose(1, 2).detach()  # [B, G, T, E]
            keys = run.maps[layer].shape[3] if maps is not None else new.shape[2]
            old = self.v.get(layer)
            grows = self.cache and old is not None and new.shape[2] < keys
            self.v[layer] = torch.cat([old, new], 2) if grows and old is not None else new
        if self.norm == "frozen" and self.fitted is None and ids.shape[1] > 1:
            assert run.output is not None
            self.fitted = norm_of(run.acts[reads[-1]], run.output)
        self.provenance = run.provenance
        return run

    def _score(self, run: Run, written: Tensor) -> None:
        """What this step's row of every map adds to the logit of the token written, all in float64."""
        u = unembeddings(self.model, written).double().cpu()
        if self.norm == "frozen":
            if self.fitted is None:
                raise WorkbenchError("norm='frozen' reads the norm off a prompt of three tokens or more")
            u = self.fitted.through(u, run.acts[Site("resid_post", self.layers[-1])][:, -1].double().cpu())
        found, chance = [], []
        for layer in self.layers:
            amap, v = run.maps[layer], self.v[layer]
            row = amap.rows(amap.shape[2] - 1, amap.shape[2])[:, :, 0].double().cpu()  # [B, H, K]
            heads, groups = row.shape[1], v.shape[1]
            if v.shape[2] != row.shape[2]:
                raise Refused(f"layer {layer} of {self.model.name} keeps {v.shape[2]} values for {row.shape[2]} keys")
            weight = output_weights(self.model, layer)
            work = working_dtype(weight.dtype)
            through = torch.einsum("hed,bd->bhe", weight.to(work), u.to(weight.device, work))  # u W_O^T: [B, H, E]
            grouped = through.unflatten(1, (groups, heads // groups))
            added = torch.einsum("bgme,bgke->bgmk", grouped, v.to(work)).flatten(1, 2).double().cpu()
            phi = row * added
            self._check(layer, phi.sum(-1), through, run.acts[Site("z", layer)][:, -1], v.dtype)
            parts = [self._contrast(phi), self._contrast(row)]
            total = phi.sum(-1)
            found.append(torch.stack([parts[0][0], parts[0][1], total, parts[1][0]], 1))
            chance.append(torch.stack([parts[0][2], torch.zeros_like(total), total, parts[1][2]], 1))
        self.values.append(torch.stack(found, 2))  # [B, measures, L, H]
        self.chance.append(torch.stack(chance, 2))

    def _contrast(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ``[B, H, K]``: needle beyond chance, needle, and the first where the needle is not; each ``[B, H]``."""
        keys = phi.shape[2]
        running = torch.nn.functional.pad(phi.cumsum(-1), (1, 0))
        beyond, inside, elsewhere = [], [], []
        for b, (lo, hi) in enumerate(self.spans.tolist()):
            size, rest = hi - lo, keys - (hi - lo)
            needle, whole = running[b, :, hi] - running[b, :, lo], running[b, :, -1]
            inside.append(needle)
            beyond.append(needle - size / rest * (whole - needle) if rest else torch.full_like(needle, float("nan")))
            others = windows_elsewhere(running[b], lo, hi, self.prompt.shape[1])
            contrast = others - size / max(1, rest) * (whole[:, None] - others)
            elsewhere.append(contrast.mean(-1))
        return torch.stack(beyond), torch.stack(inside), torch.stack(elsewhere)

    def _check(self, layer: int, total: Tensor, through: Tensor, z: Tensor, dtype: torch.dtype) -> None:
        """Refuse a layer whose head outputs are not its map times its values."""
        own = (through.double().cpu() * z.double().cpu()).sum(-1)
        size = (through.double().cpu().norm(dim=-1) * z.double().cpu().norm(dim=-1)).amax()
        allowed = _TOLERANCE.get(dtype, 3e-2) * float(size) + 1e-12
        if float((own - total).abs().max()) > allowed:
            raise Refused(
                f"layer {layer} of {self.model.name}: head outputs are not the map times the values (off by "
                f"{float((own - total).abs().max()):.2g}), so that no key has a contribution of its own"
            )


ANALYSES = (
    Analysis(
        name="contributions",
        question="Which heads write the answer out of the needle?",
        function=contributions,
        example=lambda: {"model": bundled("compiled-needle"), "pairs": needles(bundled("compiled-needle"))},
        paper="LOCOS 2026 (arXiv 2607.01002), contrastive logit contribution",
        source="model",
        null="all windows as long as the needle elsewhere in the prompt",
        cause="compare_rankings, recovery",
        definition="the answer's steps are those that write a token of the needle or an accepted answer",
    ),
)
