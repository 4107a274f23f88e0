"""What a coder sees in a model: its sites, rows of activations batch by batch, and its output put back in their place.

A coder knows the sites that it reads and writes by ``about["reads"]`` and ``about["writes"]``. Heads are concatenated: a site of
shape ``[B, T, H, E]`` gives rows of width H E. Padding is left out, and so are the positions of tokens in ``ignore`` (a sink at
the first token, say): they are neither judged nor replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model, Tokens
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.coders.coder import Coder
    from workbench.run import Run

Sites = str | Site | Sequence[str | Site]
Texts = str | Sequence[str] | Tensor | Tokens
_NUMBERS = 2**22
"""How many activations of features are held at once."""


@dataclass(frozen=True)
class Places:
    """The sites that a coder reads and writes, and the width of each."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    read_widths: tuple[int, ...]
    write_widths: tuple[int, ...]

    @property
    def all(self) -> tuple[Site, ...]:
        """Every site once, read ones first."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))


@dataclass(frozen=True)
class Rows:
    """One batch: N judged positions of texts ``first``, ``first + 1`` ...

    ``real`` ``[B, T]`` says which positions are judged, ``text`` and ``position`` ``[N]`` where each row comes from, ``x``
    ``[N, D_in]`` what the coder reads and ``target`` ``[N, D_out]`` what it should write, both as the model has them.
    """

    first: int
    run: Run
    real: Tensor
    text: Tensor
    position: Tensor
    x: Tensor
    target: Tensor


def places(coder: Coder, site: Sites | None = None, target: Sites | None = None) -> Places:
    """The sites of a coder: its own, or ``site`` and ``target`` where they are given.

    An autoencoder writes where it reads, so that ``site`` alone is enough. Refused: a coder that names no site, a transcoder
    whose target is not known, another number of sites than the coder has parts.
    """
    about = coder.about
    known = {name: _sites(about.get(name)) for name in ("reads", "writes")}
    reads = known["reads"] if site is None else _sites(site)
    if not reads:
        raise WorkbenchError("the coder does not say where it reads; pass site=, as in site='blocks.1.hook_resid_post'")
    writes = known["writes"] if target is None else _sites(target)
    if target is None:
        same = known["writes"] == known["reads"] if known["writes"] else coder.centred
        writes = reads if same else writes
    if not writes:
        raise WorkbenchError(f"the coder reads {_names(reads)} and does not say where it writes; pass target=")
    if site is not None and target is None and writes != reads and known["reads"] != reads:
        raise WorkbenchError(
            f"the coder goes from {_names(known['reads'])} to {_names(writes)}; with site={_names(reads)} pass target= as well"
        )
    for what, found, widths in (("reads", reads, coder.reads), ("writes", writes, coder.writes)):
        if len(found) != len(widths):
            raise WorkbenchError(f"the coder {what} {len(widths)} sites; got {len(found)}: {_names(found)}")
    return Places(reads, writes, tuple(coder.reads), tuple(coder.writes))


def batches(model: Model, texts: Texts, size: int) -> Iterator[tuple[int, Tokens]]:
    """``(index of the first text, Tokens)`` of ``size`` texts at a time. Texts are tokenized batch by batch."""
    if size < 1:
        raise WorkbenchError(f"a batch holds at least one text; got batch={size}")
    if isinstance(texts, Tokens):
        if texts.inputs or not texts.ids.shape[1]:
            raise Refused(
                "coders are judged on texts, token ids or Tokens without further inputs; use array_quality on rows"
            )
        for i in range(0, len(texts.ids), size):
            part = slice(i, i + size)
            yield i, Tokens(texts.ids[part], texts.mask[part], texts.labels[part])
        return
    if isinstance(texts, Tensor):
        if texts.is_floating_point() or texts.ndim != 2:
            raise WorkbenchError(f"token ids are integers [N, T]; got {texts.dtype} {list(texts.shape)}")
        for i in range(0, len(texts), size):
            yield i, Tokens.of(texts[i : i + size], model.tokenizer)
        return
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise WorkbenchError("no text given: pass a list of texts, token ids [N, T] or Tokens")
    for i in range(0, len(given), size):
        yield i, model.tokens(given[i : i + size])


def count(texts: Texts) -> int:
    """How many texts there are."""
    return 1 if isinstance(texts, str) else len(texts.ids) if isinstance(texts, Tokens) else len(texts)


@torch.no_grad()
def rows(
    model: Model,
    texts: Texts,
    where: Places,
    *,
    batch: int = 8,
    ignore: Sequence[int] = (),
    logits: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Rows]:
    """The judged positions of every batch. Refuses activations that are not finite, and texts that leave no position."""
    total, seen = count(texts), 0
    for first, tokens in batches(model, texts, batch):
        run = model.run(tokens, read=where.all, logits=logits)
        real = run.tokens.mask.cpu()
        if ignore:
            real = real & ~torch.isin(run.tokens.ids.cpu(), torch.tensor(list(ignore)))
        text, position = real.nonzero(as_tuple=True)
        seen += len(text)
        x = _joined(run.acts, where.reads, where.read_widths, real)
        target = x if where.writes == where.reads else _joined(run.acts, where.writes, where.write_widths, real)
        yield Rows(first, run, real, text, position, x, target)
        if progress is not None:
            progress(min(first + batch, total), total)
    if not seen:
        raise WorkbenchError("no position is left to judge: every token is padding or among the ignored ones")


def replaced(where: Places, real: Tensor, y: Tensor) -> Mapping[Site | str, Edit]:
    """Edits that put rows ``y`` ``[N, D_out]`` at the positions ``real`` ``[B, T]`` of the written sites; all others stay."""
    parts = y.split(list(where.write_widths), dim=-1)
    return {site: _put(real, part) for site, part in zip(where.writes, parts, strict=True)}


def chunks(x: Tensor, features: int) -> Iterator[Tensor]:
    """``x`` ``[N, D]`` in parts whose codes of that many features fit a fixed amount of memory."""
    yield from x.split(max(1, _NUMBERS // features))


def like(x: Tensor, coder: Coder) -> Tensor:
    """``x`` on the coder's device and of its type."""
    return x.to(coder.W_dec.device, coder.W_dec.dtype)


def decoded(coder: Coder, f: Tensor, x: Tensor) -> Tensor:
    """The coder's output for codes ``f`` of rows ``x``, the skip term included."""
    return coder.decode(f) + coder.skipped(x)


def check_rows(name: str, x: Any, width: int | None = None) -> Tensor:
    """``x`` as a finite tensor ``[N, D]`` of floating numbers."""
    found = torch.as_tensor(x).detach()
    if found.ndim != 2 or not len(found):
        raise WorkbenchError(f"{name} holds rows [N, D]; got {list(found.shape)}")
    if width is not None and found.shape[1] != width:
        raise WorkbenchError(f"{name} has rows of width {width}, as the coder does; got {list(found.shape)}")
    found = found if found.is_floating_point() else found.float()
    if not bool(found.isfinite().all()):
        raise WorkbenchError(f"{name} holds {int((~found.isfinite()).sum())} numbers that are NaN or infinite")
    return found


def check_features(features: Sequence[int] | Tensor, count: int) -> list[int]:
    """Indices of features, each once; an unknown one is refused."""
    found = [int(i) for i in features]
    for i in found:
        if not 0 <= i < count:
            raise UnknownName("feature", i, [f"0 to {count - 1}"])
    return list(dict.fromkeys(found))


def site_rows(acts: Tensor, real: Tensor, site: Site, width: int | None = None) -> Tensor:
    """Activations ``[B, T, ...]`` of a site at the positions ``real``, heads concatenated: ``[N, D]``."""
    if acts.ndim < 3 or acts.shape[:2] != real.shape:
        raise Refused(f"{site} has no row for every token: {list(acts.shape)} for {list(real.shape)} tokens")
    found = acts.flatten(2)[real.to(acts.device)]
    if width is not None and found.shape[1] != width:
        raise WorkbenchError(f"{site} has width {found.shape[1]} in this model; the coder expects {width}")
    if not bool(found.isfinite().all()):
        raise WorkbenchError(f"{site} holds activations that are NaN or infinite")
    return found


def _joined(acts: Mapping[Any, Tensor], sites: Sequence[Site], widths: Sequence[int], real: Tensor) -> Tensor:
    parts = [site_rows(acts[site], real, site, width) for site, width in zip(sites, widths, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _put(real: Tensor, part: Tensor) -> Edit:
    def put(value: Tensor) -> Tensor:
        flat = value.flatten(2).clone()
        flat[real.to(flat.device)] = part.to(flat.device, flat.dtype)
        return flat.reshape(value.shape)

    return put


def _sites(given: Any) -> tuple[Site, ...]:
    if given is None:
        return ()
    return tuple(Site.parse(one) for one in ([given] if isinstance(given, str | Site) else given))


def _names(sites: Sequence[Site]) -> str:
    return ", ".join(map(str, sites))
