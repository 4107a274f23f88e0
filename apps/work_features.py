"""What the features page has computed: dashboards of the features of a coder, and how good the coder is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.results import new_folder

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from workbench.coders.coder import Coder
    from workbench.jobs.probes import Outcome
    from workbench.models.protocol import Model
    from workbench.probes.features.feature_pages import FeatureDashboard, FeaturePage

ALL = 1024
"""Coders with at most so many features have a page for each; larger ones for those that write most, and on request."""
TEXTS = 64
TOP, PER_RANGE, WINDOW = 8, 2, (10, 5)
"""Examples on a page: the strongest, of each part of the range; and tokens before and after each."""
_FORMAT = 1
_FILE = "pages.json"


def dashboards(
    model: Model, coder: str, texts: str | None = None, number: int = TEXTS, features: list[int] | None = None, seed: int = 0
) -> Outcome:  # fmt: skip
    """Pages of ``features`` of a coder on ``number`` held-out texts; by default of all features, of a coder with more than
    ``ALL`` of those that write most. ``coder`` is a bundled name or a folder, ``texts`` as in ``workbench sae features``.

    The pages are saved; ``board_at`` reads them."""
    import workbench as wb
    from workbench.apps.commands.sae_eval import held_out
    from workbench.jobs.probes import Outcome

    found = usable_coder(coder)
    tokens, _ = held_out(model, found, texts, number, seed)
    chosen = features or (list(range(found.features)) if found.features <= ALL else None)
    board = wb.feature_dashboard(
        found, model, tokens, chosen, top=TOP, per_range=PER_RANGE, window=WINDOW, seed=seed
    )  # fmt: skip
    return Outcome(board.frame(), SavedBoard(board))


def quality(model: Model, coder: str, texts: str | None = None, number: int = TEXTS, seed: int = 0) -> pd.DataFrame:
    """How good a coder is on ``number`` held-out texts: ``measure value low high null tokens``, as ``wb.coder_quality`` has."""
    import workbench as wb
    from workbench.apps.commands.sae_eval import held_out

    found = usable_coder(coder)
    tokens, _ = held_out(model, found, texts, number, seed)
    return wb.coder_quality(found, model, tokens, seed=seed).frame()


def usable_coder(name: str) -> Coder:
    """The coder of a bundled name or folder; refused where it has no features at single tokens."""
    from workbench.apps.commands.sae_eval import loaded_coder

    found = loaded_coder(Path(name))
    if found.kind == "discrete":
        raise WorkbenchError(
            f"{name} codes the output of every head over a whole text and has no features at single tokens; it belongs to the "
            "circuit method discrete-sae"
        )
    return found


@dataclass(frozen=True)
class SavedBoard:
    """Pages of features as one JSON file: a thousand pages hold ten thousand small rows."""

    board: FeatureDashboard

    def save(self, path: str | Path) -> Path:
        """Write ``pages.json`` into the new folder ``path``."""
        path = Path(path)
        record = {"format": _FORMAT, **asdict(self.board)}
        record["provenance"] = self.board.provenance.dict()
        for page in record["pages"]:
            page["histogram"], page["heads"] = page["histogram"].tolist(), page["heads"].tolist()
            for example in page["examples"]:
                example.pop("sources")
                example.pop("source_tokens")
                example["values"] = [float(f"{value:.5g}") for value in example["values"]]
        with new_folder(path) as part:
            (part / _FILE).write_text(json.dumps(record), encoding="utf-8")
        return path


def board_at(folder: str | Path) -> FeatureDashboard:
    """The dashboards saved in ``folder``; a missing or damaged file raises and is named."""
    from workbench.probes.features.feature_pages import FeatureDashboard
    from workbench.run import Provenance

    path = Path(folder) / _FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("format") != _FORMAT:
            raise WorkbenchError(f"{path} has another format than this version reads; compute it again")
        pages = tuple(_page(page) for page in record.pop("pages"))
        record |= {name: tuple(record[name]) for name in ("reads", "writes", "notes")}
        return FeatureDashboard(**{**record, "pages": pages, "provenance": Provenance(**record["provenance"])})
    except WorkbenchError:
        raise
    except Exception as error:
        raise WorkbenchError(f"{path} is damaged or missing: {type(error).__name__}: {error}") from error


def _page(record: dict[str, Any]) -> FeaturePage:
    import torch

    from workbench.probes.features.feature_pages import Example, FeaturePage

    given = dict(record)
    for name in ("histogram", "heads"):
        given[name] = torch.tensor(given[name], dtype=torch.float64)
    for name in ("raises", "lowers", "goes_with"):
        given[name] = tuple(map(tuple, given[name]))
    given["examples"] = tuple(
        Example(**{**one, "tokens": tuple(one["tokens"]), "values": tuple(one["values"])}) for one in given["examples"]
    )
    return FeaturePage(**given)


def heads_of_features(board: FeatureDashboard) -> pd.DataFrame:
    """For coders of z, one row per head: ``features`` that write through it more than through any other, and ``share``, its mean
    share in the decoder rows of all features. Without rows for other coders."""
    import pandas as pd
    import torch

    pages = [page for page in board.pages if len(page.heads)]
    if not pages:
        return pd.DataFrame({"head": [], "features": [], "share": []})
    shares = torch.stack([page.heads for page in pages])
    counts = torch.bincount(shares.argmax(1), minlength=shares.shape[1])
    return pd.DataFrame({"head": range(shares.shape[1]), "features": counts.numpy(), "share": shares.mean(0).numpy()})


def matching(board: FeatureDashboard, text: str = "", head: int | None = None) -> pd.DataFrame:
    """``board.frame()`` of the features whose strongest tokens or raised tokens hold ``text`` (letters of any case), and that
    write most through ``head``."""
    table = board.frame()
    wanted = text.casefold().strip()
    keep = [_says(page, wanted) and (head is None or (len(page.heads) > 0 and int(page.heads.argmax()) == head))
            for page in board.pages]  # fmt: skip
    return table[keep].reset_index(drop=True)


def _says(page: Any, wanted: str) -> bool:
    if not wanted:
        return True
    words = [example.token for example in page.group("top")] + [token for token, _ in page.raises]
    return any(wanted in word.casefold() for word in words)


def bars(heads: Sequence[float] | torch.Tensor, ax: Any = None, *, label: str = "share of the decoder row") -> Any:
    """One bar per head."""
    from workbench.results import axis

    ax = axis(ax, 4.6, 2.4)
    values = [float(value) for value in heads]
    ax.bar(range(len(values)), values, color="#1f6f8b")
    ax.set(xlabel="head", ylabel=label)
    ax.set_xticks(range(0, len(values), max(1, len(values) // 16)))
    return ax


def densities(board: FeatureDashboard, ax: Any = None) -> Any:
    """Features by how often they are active, on a logarithmic axis; those that never are stand at the left edge."""
    import numpy as np

    from workbench.results import axis

    ax = axis(ax, 5.4, 3.0)
    found = np.array([page.density for page in board.pages])
    least = 0.5 / max(1, board.tokens)
    ax.hist(np.maximum(found, least), bins=np.geomspace(least, 1.0, 31), color="#1f6f8b")
    never = int((found == 0).sum())
    ax.set(xscale="log", xlabel="share of tokens at which a feature is active", ylabel="features")
    ax.set_title(f"{len(found):,} features, {never:,} never active here", fontsize="medium")
    return ax
