"""Jobs of the page of known heads that are more than one call of an analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import pandas as pd

    from workbench.jobs.probes import Cell
    from workbench.models.protocol import Model
    from workbench.probes.ablation import AblationCurve
    from workbench.probes.heads.kinds import HeadScores
    from workbench.probes.tables import HeadTable

KINDS = ("previous", "duplicate", "induction", "first", "current")


def looks(model: Model, batches: int = 2, sequences: int = 8, raw: bool = False, seed: int = 0) -> pd.DataFrame:
    """``wb.head_scores`` of all kinds on repeated random words, a row per head: ``layer, head``, then each kind with its
    ``_low _high _null``."""
    import workbench as wb

    return wide(wb.head_scores(model, kinds=KINDS, batches=batches, sequences=sequences, raw=raw, seed=seed))


def looks_in_run(cell: Cell, run: str, shuffles: int = 16, raw: bool = False, seed: int = 0) -> pd.DataFrame:
    """As ``looks``, on the text of a captured run; the null shuffles the identities of its tokens."""
    import workbench as wb
    from workbench.apps.work_runs import stored_run

    return wide(wb.head_scores(stored_run(cell, run), kinds=KINDS, shuffles=shuffles, raw=raw, seed=seed))


def wide(scores: HeadScores) -> pd.DataFrame:
    """A row per head instead of one per head and kind."""
    import pandas as pd

    frame = scores.frame()
    parts = []
    for kind in scores.kinds:
        part = frame[frame["kind"] == kind].set_index(["layer", "head"])
        names = {"value": kind} | {end: f"{kind}_{end}" for end in ("low", "high", "null")}
        parts.append(part[list(names)].rename(columns=names))
    return pd.concat(parts, axis=1).reset_index()


def positions(model: Model, sequences: int = 16, length: int = 48, raw: bool = False, seed: int = 0) -> HeadTable:
    """``wb.positional_share`` on random tokens."""
    import workbench as wb
    from workbench.probes.heads.positional import random_texts

    ids = random_texts(model, sequences, length, None, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return wb.positional_share(model.run(ids, maps=wb.capture(), logits=None), raw=raw)


def classes(model: Model, texts: int = 4, words: int = 80, seed: int = 0) -> HeadTable:
    """``wb.token_classes`` on stories."""
    import workbench as wb
    from workbench.apps.work_sinks import stories

    with torch.no_grad():
        run = model.run(stories(texts, words, seed), maps=wb.capture(), logits=None)
    return wb.token_classes(run, tokenizer=model.tokenizer)


def without_role(model: Model, role: str, random: int = 4, raw: bool = False, seed: int = 0) -> AblationCurve:
    """``wb.role_ablation`` of the heads that ``wb.head_roles`` gives the role."""
    import workbench as wb

    return wb.role_ablation(model, wb.head_roles(model, raw=raw, seed=seed), role, random=random, seed=seed)
