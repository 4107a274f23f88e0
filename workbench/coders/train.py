"""Train coders on what flows through a model: any sites, several coders in one pass over the data, safe against being killed.

Rows come from the model itself through a mixing block (``mixing.py``), or from a store on disk (``store.py``). With ``out`` the
training keeps ``recipe.json``, ``metrics.jsonl`` and a checkpoint there. Started again by the same recipe it goes on from the
checkpoint and takes the very steps that it would have taken: on a CPU with as many threads, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, overload

import torch

from workbench.coders.catalogue import coder_kinds
from workbench.coders.checkpoints import agree, held, write_recipe
from workbench.coders.coder import Coder
from workbench.coders.feeds import feed_of
from workbench.coders.learner import NORMALISE
from workbench.coders.metrics import wanted
from workbench.coders.mixing import BLOCK
from workbench.coders.specs import CoderSpec
from workbench.coders.store import ActivationStore
from workbench.coders.training import Training, places_of
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.sites import Site

STEPS, BATCH, EVERY = 500, 1024, 100
_LEAST = 4096
"""Rows of a block in a short training: the start is taken from them."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def train_coders(
    model: Model | Sequence[Model] | None,
    specs: Sequence[CoderSpec],
    texts: Any = None,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    batch: int = BATCH,
    rate: float | None = None,
    seed: int = 0,
    context: int | None = None,
    prepend_bos: bool | None = None,
    skip_first: bool = False,
    store: ActivationStore | None = None,
    data: str = "",
    block: int | None = None,
    normalise: str = "expected",
    dead_after: int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    every: int = EVERY,
    log: str | Iterable[str] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> tuple[Coder, ...]:
    """Train every coder of ``specs``, all of them on the same rows, in one pass over the data.

    ``texts``: a list of texts, token ids ``[B, T]``, or an iterable, as in ``site_rows``; a list is read again when it ends, an
    iterable that ends too early is refused. Or ``store``: rows from disk. Length: ``steps`` of ``batch`` rows, or that many
    ``tokens``. ``data`` says in words what the texts are, for ``about``. ``block``: rows that are shuffled together. ``rate``,
    ``normalise``, ``dead_after``: see ``Learner``.

    ``out``: a folder for the recipe, ``metrics.jsonl``, a checkpoint ``every`` so many steps, and at the end the coder in
    ``out/coder`` (several: ``out/coders/<number>-<site>``). With ``resume`` a training that stopped there goes on, one that
    ended is loaded; another recipe is refused, with the difference. ``log``: ``jsonl``, ``wandb``, ``trackio``.

    Trained coders take and give activations as they are in the model; ``about`` says what they were trained on.
    """
    specs = tuple(specs)
    if not specs:
        raise WorkbenchError("no coder to train: specs is empty")
    length = _steps(steps, tokens, batch)
    for name, value in (("batch", batch), ("every", every), ("block", BLOCK if block is None else block)):
        _whole(name, value)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise WorkbenchError(f"seed is a whole number from 0 to {2**32 - 1}; got {seed!r}")
    if normalise not in NORMALISE:
        raise UnknownName("normalisation", normalise, NORMALISE)
    if rate is not None and not rate > 0:
        raise WorkbenchError(f"rate is a learning rate above 0; got {rate!r}")
    if dtype not in _DTYPES:
        raise UnknownName("type to train in", dtype, _DTYPES)
    folder = None if out is None else Path(out)
    loggers = wanted(log, folder)
    sites = tuple(dict.fromkeys(site for spec in specs for site in (*spec.reads, *spec.writes)))
    feed = feed_of(
        model, sites, texts, store, batch=batch, seed=seed, context=context, prepend_bos=prepend_bos, skip_first=skip_first,
        block=min(BLOCK, max(length * batch, _LEAST)) if block is None else block, dtype=_DTYPES[dtype], device=device,
    )  # fmt: skip
    recipe = {
        "coders": [spec.json() for spec in specs], "steps": length, "batch": batch, "rate": rate, "seed": seed,
        "normalise": normalise, "dead_after": dead_after, "dtype": dtype, "texts": data, **feed.recipe,
    }  # fmt: skip
    with held(folder, resume=resume):
        places = places_of(folder, specs)
        if folder is not None:
            agree(folder, recipe)
            if all(place.is_dir() for place in places):
                return tuple(Coder.load(place) for place in places)
        options = {"rate": rate, "seed": seed, "normalise": normalise, "dead_after": dead_after}
        training = Training(specs, feed, recipe, folder, length, batch, options, _DTYPES[dtype])
        training.begin(loggers)
        if folder is not None:
            write_recipe(folder, recipe)
        training.run(every, tick)
        return training.finish(places)


@overload
def train_sae(model: Model | None, site: str | Site, texts: Any = None, **options: Any) -> Coder: ...
@overload
def train_sae(
    model: Model | None, site: Sequence[str | Site], texts: Any = None, **options: Any
) -> tuple[Coder, ...]: ...
def train_sae(
    model: Model | None,
    site: str | Site | Sequence[str | Site],
    texts: Any = None,
    *,
    kind: str = "topk",
    features: int = 1024,
    **options: Any,
) -> Coder | tuple[Coder, ...]:
    """A sparse autoencoder of what ``site`` holds while ``model`` reads ``texts``; for a list of sites a tuple of them,
    trained side by side in one forward pass.

    ``kind``: one of ``wb.coder_kinds()``; ``features``: F. Further options are those of the training (``train_coders``: steps,
    batch, seed, out ...), of the start (``start``), and of the kind (``k``, ``sparsity`` ...); others are refused.
    """
    training, start, own = _options(kind, options)
    sites = [site] if isinstance(site, str | Site) else list(site)
    specs = [CoderSpec((str(one),), (str(one),), kind, features, start=start, options=own) for one in sites]
    found = train_coders(model, specs, texts, **training)
    return found[0] if isinstance(site, str | Site) else found


def train_transcoder(
    model: Model | None,
    reads: str | Site | Sequence[str | Site],
    writes: str | Site | Sequence[str | Site],
    texts: Any = None,
    *,
    kind: str = "topk",
    features: int = 1024,
    skip: bool = False,
    **options: Any,
) -> Coder:
    """A transcoder: features of what ``reads`` holds that predict what ``writes`` holds, such as the input and the output
    of an MLP, ``blocks.1.ln2.hook_normalized`` and ``blocks.1.hook_mlp_out``. ``skip`` adds a linear map. Options as in
    ``train_sae``."""
    training, start, own = _options(kind, options)
    spec = CoderSpec(_several(reads), _several(writes), kind, features, skip, start, own)
    if spec.same:
        raise WorkbenchError(f"a transcoder reads one site and writes another; got {', '.join(spec.reads)} for both")
    return train_coders(model, [spec], texts, **training)[0]


def train_crosscoder(
    model: Model | Sequence[Model] | None,
    sites: str | Site | Sequence[str | Site],
    texts: Any = None,
    *,
    kind: str = "topk",
    features: int = 1024,
    **options: Any,
) -> Coder:
    """A crosscoder: one dictionary for several sites of a model, or for the same site (or sites) of several models with the same
    tokens. A site of several models is then written ``0:blocks.1.hook_resid_post``, ``1:...``; without a number it is read in
    every model. Options as in ``train_sae``."""
    training, start, own = _options(kind, options)
    places = _several(sites)
    if isinstance(model, Sequence):
        bare = [site for site in places if not str(site).partition(":")[0].isdigit()]
        numbered = [site for site in places if site not in bare]
        places = (*numbered, *(f"{i}:{site}" for site in bare for i in range(len(model))))
    spec = CoderSpec(places, places, kind, features, start=start, options=own)
    if len(spec.reads) < 2:
        raise WorkbenchError(
            "a crosscoder joins at least two sites, or one site of two models; train_sae takes one site"
        )
    return train_coders(model, [spec], texts, **training)[0]


def _several(sites: str | Site | Sequence[str | Site]) -> tuple[str, ...]:
    return (str(sites),) if isinstance(sites, str | Site) else tuple(map(str, sites))


def _options(kind: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """Options sorted: those of the training, of the start, of the kind."""
    of_training = [name for name, p in signature(train_coders).parameters.items() if p.kind is p.KEYWORD_ONLY]
    kinds = coder_kinds()
    if kind not in kinds:
        raise UnknownName("kind of coder", kind, kinds)
    of_kind = list(kinds[kind].defaults)
    for name in given:
        if name not in of_training and name not in of_kind and name != "start":
            raise UnknownName(f"option of {kind} coders or of training", name, [*of_kind, "start", *of_training])
    training = {name: value for name, value in given.items() if name in of_training}
    own = {name: value for name, value in given.items() if name in of_kind}
    return training, given.get("start"), own


def _steps(steps: int | None, tokens: int | None, batch: int) -> int:
    if steps is not None and tokens is not None:
        raise WorkbenchError(
            f"the length of a training is given in steps or in tokens; got steps={steps} and tokens={tokens}"
        )
    _whole("batch", batch)
    if tokens is not None:
        _whole("tokens", tokens)
        return -(-tokens // batch)
    return STEPS if steps is None else _whole("steps", steps)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkbenchError(f"{name} is a whole number from 1; got {value!r}")
    return value
