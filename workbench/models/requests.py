"""What every wrapper does with a request before and around the forward pass: prompts, reads, edits, budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from workbench import stored
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import DENSE_LIMIT, AttentionMap
from workbench.models.current import inside
from workbench.models.protocol import Edit, Shape, Tokens
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.captures import Capture

MAP_KINDS = ("pattern", "lse", "received", "entropy", "block_mass", "block_max")
"""Site kinds that are read off the captured attention map rather than off the forward pass."""
LOGITS_LIMIT = 2**33
Key = TypeVar("Key", bound=Site | str)


def tokenize(tokenizer: Any, texts: str | Sequence[str], shape: Shape) -> Tokens:
    """Ids, padding mask and labels of one or several texts, padded on the tokenizer's own side."""
    batch = check_texts(tokenizer, texts)
    if len(batch) > 1 and tokenizer.pad_token_id is None:
        rows = [_encode(tokenizer, text)["input_ids"] for text in batch]
        if len({len(row) for row in rows}) > 1:
            raise WorkbenchError(
                "the tokenizer has no padding token, so texts of different lengths cannot share a batch; "
                "set tokenizer.pad_token or run them one at a time"
            )
        ids, mask = torch.tensor(rows), torch.ones(len(rows), len(rows[0]), dtype=torch.bool)
    else:
        encoded = _encode(tokenizer, batch, return_tensors="pt", padding=len(batch) > 1)
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    check_length(ids.shape[1], shape)
    labels = tuple(tuple(map(str, tokenizer.convert_ids_to_tokens(row))) for row in ids.tolist())
    return Tokens(ids, mask, labels)


def _encode(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    try:
        return tokenizer(text, **options)
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise WorkbenchError(f"the model's tokenizer cannot encode the text: {error}") from error


def check_texts(tokenizer: Any, texts: str | Sequence[str]) -> list[str]:
    """The prompts as a list; refuses none, empty ones, what is no text, and text without a tokenizer."""
    if tokenizer is None:
        raise WorkbenchError("this model has no tokenizer: pass token ids (a tensor [B, T]) instead of text")
    batch = [texts] if isinstance(texts, str) else list(texts)
    if not batch:
        raise WorkbenchError("no prompt given: pass a text or a list of texts")
    for i, text in enumerate(batch):
        if not isinstance(text, str):
            raise WorkbenchError(f"prompt {i} is a {type(text).__name__}, not a text")
        if not text.strip():
            raise WorkbenchError(f"prompt {i} is empty" if len(batch) > 1 else "the prompt is empty")
    return batch


def check_length(length: int, shape: Shape) -> None:
    """Refuse inputs that are empty or longer than the model's context."""
    if length == 0:
        raise WorkbenchError("the input has no tokens")
    if shape.context is not None and length > shape.context:
        raise WorkbenchError(
            f"the input has {length} tokens, {length - shape.context} more than the model's context of {shape.context}; "
            "shorten it"
        )


def check_ids(ids: Tensor, shape: Shape) -> None:
    if shape.vocab is not None and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= shape.vocab):
        raise WorkbenchError(
            f"token ids lie in [0, {shape.vocab}) for this model; got {int(ids.min())} to {int(ids.max())}: "
            "were they made with this model's tokenizer?"
        )


def check_logits(logits: str | None, batch: int, length: int, shape: Shape, bytes_each: int = 4) -> None:
    """Refuse an unknown ``logits`` request, and one that would not fit, with the number."""
    if logits not in ("all", "last", None):
        raise UnknownName("logits request", logits, ("all", "last", None))
    if logits == "all" and shape.vocab and batch * length * shape.vocab * bytes_each > LOGITS_LIMIT:
        gigabytes = batch * length * shape.vocab * bytes_each / 1e9
        raise Refused(
            f"all logits of {batch} x {length} tokens over a vocabulary of {shape.vocab} are {gigabytes:.1f} GB; "
            'ask for logits="last" or logits=None'
        )


def check_layers(request: Capture | None, known: Sequence[int | str]) -> tuple[int | str, ...]:
    """The layers a capture asks for; unknown ones raise with the valid ones. A folder to store them in is made here."""
    if request is None:
        return ()
    for layer in request.layers or ():
        if layer not in known:
            raise UnknownName("attention layer", layer, known)
    if request.store is not None:
        stored.prepare(request.store)
    return tuple(known) if request.layers is None else request.layers


def kept(found: AttentionMap, request: Capture | None, layer: int | str) -> AttentionMap:
    """What a result keeps of a layer's map, with everything computed that ``request`` names, in memory or in its folder."""
    if request is None:
        return found
    with torch.no_grad():
        held = found.precompute(request)
        return held if request.store is None else stored.add(request.store, layer, held)


def parse_sites(
    keys: Iterable[Site | str], served: Callable[[Site], bool], names: Callable[[], Sequence[str]]
) -> list[Site]:
    """Sites of a request; one that the model does not serve raises with those it does."""
    sites = []
    for key in [keys] if isinstance(keys, str | Site) else keys:
        site = Site.parse(key)
        if not served(site):
            raise UnknownName("site of this model", site, names())
        sites.append(site)
    return sites


def parse_edits(
    edits: Mapping[Site | str, Edit | Tensor], served: Callable[[Site], bool], names: Callable[[], Sequence[str]]
) -> dict[Site, Edit | Tensor]:
    """Edits by site; a site that the model does not serve raises with those it does."""
    return check_edits(parse_sites(edits, served, names), edits.values())


def check_edits(keys: Iterable[Key], edits: Iterable[Edit | Tensor]) -> dict[Key, Edit | Tensor]:
    """Edits by parsed key; refuses a key named twice in two spellings, and statistics of the map."""
    checked: dict[Key, Edit | Tensor] = {}
    for key, edit in zip(keys, edits, strict=True):
        if key in checked:
            raise WorkbenchError(f"{key} is edited twice in one run; combine the two edits into one function")
        if isinstance(key, Site) and key.kind in MAP_KINDS and key.kind != "pattern":
            raise WorkbenchError(f"{key} is a statistic of the attention map and cannot be edited; edit pattern or z")
        checked[key] = edit
    return checked


def edited(part: Tensor, key: Site | str, edit: Edit | Tensor) -> Tensor:
    """What ``edit`` makes of ``part``: same shape, in the part's own type and place. The edit may write into its argument, and
    may run models."""
    with inside(None):
        new = edit(part.clone()) if callable(edit) else edit
    if not isinstance(new, Tensor):
        raise WorkbenchError(f"the edit of {key} returned {type(new).__name__}; it must return the new tensor")
    if new.ndim == 0:
        new = new.expand_as(part)
    if new.shape != part.shape:
        raise WorkbenchError(f"the edit of {key} gave {list(new.shape)}; the site has {list(part.shape)}")
    return new.to(part)


def apply_edits(value: Tensor, site: Site, edits: Mapping[Site, Edit | Tensor]) -> Tensor:
    """``value`` of the whole ``site`` after the edits of the site and of its single heads."""
    for key, edit in edits.items():
        if key.whole != site.whole:
            continue
        part = value if key.head is None else value.select(site.head_axis, key.head)
        new = edited(part, key, edit)
        if key.head is None:
            value = new
        else:
            value = value.clone()
            value.select(site.head_axis, key.head).copy_(new)
    return value


def site_from_map(amap: AttentionMap, site: Site, request: Capture | None) -> Tensor:
    """The tensor of a site that is a property of the attention map (``MAP_KINDS``)."""
    if site.kind == "pattern":
        # With a gate the site is the softmax pattern, as hook_pattern edits it; the map is what multiplies the values.
        value = getattr(amap, "raw", amap).dense()
    elif site.kind == "attn_scores":
        inner: Any = getattr(amap, "raw", amap)
        batch, heads, queries, keys = inner.shape
        if batch * heads * queries * keys > DENSE_LIMIT:
            raise Refused(f"{site} of {[batch, heads, queries, keys]} is over the limit of {DENSE_LIMIT:,} numbers")
        value = inner.scores.tile(slice(0, queries), slice(0, keys))
    elif site.kind == "lse":
        raw: Any = getattr(amap, "raw", amap)
        if not (hasattr(type(raw), "lse") or "lse" in vars(raw)):
            raise WorkbenchError(f"{site}: this attention has no log-sum-exp ({amap!r})")
        value = raw.lse
    elif site.kind in ("received", "entropy"):
        value = getattr(amap, site.kind)()
    else:
        if request is None or request.blocks is None:
            raise WorkbenchError(f"{site} needs a block size: pass maps=capture(blocks=64)")
        value = amap.blocks(request.blocks, "sum" if site.kind == "block_mass" else "max")
    return value if site.head is None else value.select(site.head_axis, site.head)
