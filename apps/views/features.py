"""Features: what the features of a sparse autoencoder or transcoder stand for, and which heads they write through."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.examples import EXAMPLES, example_row, examples_data
from workbench.apps.screen import coders, place, runs, state
from workbench.apps.screen.coders import Offered
from workbench.apps.screen.need import Done, guarded, job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal, readable
from workbench.apps.work_features import ALL, TEXTS, bars, board_at, densities, heads_of_features, matching

if TYPE_CHECKING:
    from workbench.probes.features.feature_pages import FeatureDashboard, FeaturePage

_FIRST = "tiny-softmax/z-1"
_ANY = "any head"
_RARE = (0.002, 0.05)
"""The page begins with a feature that is active at such a share of tokens: one that says something, and often enough."""
_LOOK = {"features": "Features", "quality": "Quality of the coder", "train": "Train one"}
_SITES = {
    "attn.hook_z": "outputs of the heads",
    "hook_mlp_out": "output of the MLP",
    "hook_resid_post": "residual stream after",
}


def page() -> None:
    st.title("Features")
    st.caption(
        "A coder writes activations as sums of few features out of many. Each feature is shown by the tokens at which it is "
        "active, the words it makes likelier, and, where it codes heads, the heads whose output it stands for."
    )
    what = state.choose("Show", list(_LOOK), "look", show=_LOOK.__getitem__, kind="segmented_control")
    if what == "train":
        _train()
        return
    chosen, model = _coder()
    texts = st.expander("Texts").columns(2)
    number = state.number("Pieces of text", 8, 512, "texts", default=TEXTS, where=texts[0], step=8)
    seed = state.number("Seed of the texts", 0, 999, "seed", default=0, where=texts[1], kind="number_input")
    if what == "quality":
        _quality(chosen, model, number, seed)
    else:
        _features(chosen, model, number, seed)


def _coder() -> tuple[Offered, str]:
    known = coders.offered()
    row = st.columns([3, 2])
    key = state.choose("Coder", list(known), "coder", default=_FIRST, show=lambda k: known[k].label, where=row[0],
                       help="Bundled ones, those trained on this page, and those in the folders given by --models.")  # fmt: skip
    chosen = known[key]
    models = place.models()
    state.forget_unless("coder of the view", key, ("coder_model", "feature", "find", "through"))
    default = chosen.model if chosen.model in models else models[0]
    model = state.choose(
        "Model", models, "coder_model", default=default, where=row[1], help="The model whose activations it codes."
    )
    return chosen, model


def _python(chosen: Offered, model: str, number: int, seed: int) -> str:
    return (
        "import workbench as wb\nfrom workbench.apps.commands.sae_eval import held_out\n"
        "from workbench.apps.work_features import usable_coder\n\n"
        f"model = wb.load({model!r})\ncoder = usable_coder({chosen.name!r})\n"
        f"texts, _ = held_out(model, coder, None, {number}, {seed})\n"
    )


# One feature, and all of them


def _features(chosen: Offered, model: str, number: int, seed: int) -> None:
    from workbench.apps.work_features import PER_RANGE, TOP, WINDOW

    done = need(_asked(chosen, model, number, seed), "Reading texts through the coder")
    board = _board(str(done.folder))
    python = _python(chosen, model, number, seed)
    python += (
        f"features = list(range(coder.features)) if coder.features <= {ALL} else None\n"
        f"board = wb.feature_dashboard(\n    coder, model, texts, features, top={TOP}, per_range={PER_RANGE}, "
        f"window={WINDOW}, seed={seed}\n)\n"
    )
    left, right = st.columns([2, 3])
    with left:
        _list(board, python)
    with right:
        _one(board, chosen, model, number, seed, python)
    table = heads_of_features(board)
    if len(table):
        with st.expander("Which heads do the features write through?"):
            code = (
                python
                + "from workbench.apps.work_features import bars, heads_of_features\n\nheads = heads_of_features(board)\n"
            )
            figure(partial(bars, table["features"].tolist(), label="features"), table, name="heads-of-features",
                   python=f"{code}bars(heads['features'], label='features')\nheads",
                   caption="Features by the head that has the largest share in their decoder row.")  # fmt: skip
    for note in board.notes:
        st.caption(literal(note))


def _asked(chosen: Offered, model: str, number: int, seed: int, features: list[int] | None = None) -> Any:
    return job(
        "workbench.apps.work_features:dashboards", model, seed=seed, coder=chosen.name, number=number, features=features
    )


@st.cache_resource(max_entries=4)
def _board(folder: str) -> FeatureDashboard:
    return board_at(folder)


def _list(board: FeatureDashboard, python: str) -> None:
    heads = len(board.pages[0].heads) if board.pages else 0
    row = st.columns([3, 2])
    text = state.held("find", str, "")
    row[0].text_input("Find a token", key="find", placeholder="a part of a token", persist_state="session",
                      help="Among the strongest tokens of a feature and those that it makes likelier.")  # fmt: skip
    head = None
    if heads:
        through = state.choose("Writes through", [_ANY, *map(str, range(heads))], "through", where=row[1],
                               show=lambda name: name if name == _ANY else f"head {name}")  # fmt: skip
        head = None if through == _ANY else int(through)
    table = matching(board, text, head).sort_values("largest", ascending=False, kind="stable").reset_index(drop=True)
    if not len(table):
        st.info("No feature fits; take out a word or choose any head.")
        return
    of_heads = ["head", "head_share"] if heads else []
    shown = table[["feature", "top_token", *of_heads[:1], "largest", "density", "raises", *of_heads[1:]]].copy()
    for name in ("top_token", "raises"):
        shown[name] = [readable(value) for value in shown[name]]

    def chosen() -> None:
        rows = st.session_state["list of features"].selection.rows
        if rows:
            state.put("feature", int(shown["feature"][rows[0]]))

    st.dataframe(
        shown, hide_index=True, key="list of features", on_select=chosen, selection_mode="single-row", height=560,
        column_config={
            "density": st.column_config.NumberColumn("active at", format="percent", help="Share of tokens where it is active."),
            "largest": st.column_config.NumberColumn(format="%.3g", help="Its largest activation."),
            "top_token": st.column_config.TextColumn("strongest token"),
            "head": st.column_config.NumberColumn("head", help="The head with the largest share of its decoder row."),
            "head_share": st.column_config.NumberColumn("share", format="percent"),
            "raises": st.column_config.TextColumn("makes likelier"),
        },
    )  # fmt: skip
    less = (
        ""
        if len(board.pages) == board.features
        else f" Of {board.features:,} features these write most; ask for others by number."
    )
    st.caption(f"{len(table):,} features on {board.tokens:,} tokens of {board.texts:,} texts.{less}")
    downloads(board.frame(), name="features", python=python + "board.frame()")


def _one(board: FeatureDashboard, chosen: Offered, model: str, number: int, seed: int, python: str) -> None:
    sparse = [page for page in board.pages if _RARE[0] <= page.density <= _RARE[1]] or list(board.pages)
    first = max(sparse, key=lambda page: page.largest).feature if sparse else 0
    feature = state.number("Feature", 0, board.features - 1, "feature", default=first, kind="number_input")
    pages = {page.feature: page for page in board.pages}
    if feature not in pages:
        done = need(_asked(chosen, model, number, seed, [feature]), f"Reading texts for feature {feature}")
        board = _board(str(done.folder))
        pages = {page.feature: page for page in board.pages}
        python = python.replace("texts, features,", f"texts, [{feature}],")
    found = pages[feature]
    st.markdown(
        f"Active at **{found.density:.2%}** of the tokens, mean **{found.mean:.3g}** there, largest **{found.largest:.3g}**"
    )
    if not found.examples:
        st.info("This feature is never active on these texts; take more of them, or another feature.")
        return
    EXAMPLES.show(_examples(found), key="examples")
    _words(found)
    if len(found.heads):
        _heads(found, board, model, python)
    with st.expander("How strong is it where it is active?"):
        code = f"{python}board.plot(feature={feature})\nboard.frame()"
        figure(partial(board.plot, feature=feature), board.examples().query(f"feature == {feature}"), name=f"feature-{feature}",
               python=code, caption="Tokens by activation; the axis of counts is logarithmic above 1.")  # fmt: skip


def _examples(found: FeaturePage) -> dict[str, Any]:
    groups = []
    for name in found.groups:
        said = "strongest tokens" if name == "top" else f"drawn at random from {name} of the largest activation"
        rows = [
            example_row(one.tokens, one.values, at=one.at, note=f"{one.activation:.3g}") for one in found.group(name)
        ]
        groups.append((said, rows))
    return examples_data(groups, top=found.largest if found.largest > 0 else None, title=f"Feature {found.feature}")


def _words(found: FeaturePage) -> None:
    row = st.columns(3)
    for column, title, pairs in ((row[0], "makes likelier", found.raises), (row[1], "makes less likely", found.lowers)):
        with column:
            st.caption(title, help="Change of the token's logit on the direct path, per unit of activation.")
            said = [f"{value:+.2f}  {readable(token)}" for token, value in pairs[:8]]
            st.text("\n".join(said) or "not on a direct path to the logits")
    with row[2]:
        st.caption("active together with", help="Correlation of activations over all tokens.")
        for other, r in found.goes_with:
            st.button(
                f"{other} ({r:.2f})", key=f"other {other}", type="tertiary", on_click=state.put, args=("feature", other)
            )


def _heads(found: FeaturePage, board: FeatureDashboard, model: str, python: str) -> None:
    import pandas as pd

    from workbench.sites import Site

    st.caption("heads by their share of the decoder row", help="The heads whose output this feature stands for.")
    shares = found.heads.tolist()
    table = pd.DataFrame({"head": range(len(shares)), "share": shares})
    code = (
        python
        + f"from workbench.apps.work_features import bars\n\nheads = board.page({found.feature}).heads\nbars(heads)\n"
    )
    figure(partial(bars, found.heads), table, name=f"heads-{found.feature}", python=code + "heads")
    layer = Site.parse(board.writes[0]).layer
    run = next((one.key for one in runs.captured() if one.job.model == model), None)
    with st.container(horizontal=True):
        for head in found.heads.argsort(descending=True)[:3].tolist():
            query = {"layer": str(layer), "head": str(head)} | ({"run": run} if run else {})
            st.page_link("views/head.py", label=f"layer {layer}, head {head}: {shares[head]:.0%}", query_params=query,
                         icon=":material/grid_on:")  # fmt: skip


# How good the coder is


def _quality(chosen: Offered, model: str, number: int, seed: int) -> None:
    asked = job("workbench.apps.work_features:quality", model, seed=seed, coder=chosen.name, number=number)
    done = need(asked, "Judging the coder")
    table = done.table()
    values = dict(zip(table["measure"], table["value"], strict=True))
    row = st.columns(4)
    row[0].metric("active per token", f"{values['l0']:.3g}", border=True)
    row[1].metric("unexplained variance", f"{values['fvu']:.1%}", border=True, help="1 is a constant.")
    if "ce_recovered_mean" in values:
        row[2].metric("loss recovered", f"{values['ce_recovered_mean']:.1%}", border=True,
                      help="With the coder in the model: 100% loses nothing, 0% is as bad as the mean activation.")  # fmt: skip
    row[3].metric("never active", f"{values['dead']:.1%}", border=True)
    python = _python(chosen, model, number, seed)
    st.dataframe(table, hide_index=True, column_config={name: st.column_config.NumberColumn(format="%.4g")
                                                       for name in ("value", "low", "high", "null")})  # fmt: skip
    st.caption("low, high: 95% interval over texts; null: the same code through a shuffled decoder.")
    downloads(
        table,
        name="quality",
        python=python + f"found = wb.coder_quality(coder, model, texts, seed={seed})\nfound.frame()",
    )
    boards = need(_asked(chosen, model, number, seed), "Reading texts through the coder")
    board = _board(str(boards.folder))
    figure(
        partial(densities, board), board.frame()[["feature", "density"]], name="densities",
        python=f"{python}from workbench.apps.work_features import densities\n\nboard = wb.feature_dashboard(\n    coder, model, "
        f"texts, list(range(min(coder.features, {ALL}))), seed={seed}\n)\ndensities(board)\n"
        "board.frame()[['feature', 'density']]",
    )  # fmt: skip


# A training


def _train() -> None:
    import workbench as wb
    from workbench.models.load import bundled

    st.caption("Trains an autoencoder on the texts that a bundled model was made for, or on prompts of a task.")
    model = state.choose("Model", [name for name in place.models() if name != "tiny-vit"], "train_model")
    with st.form("training"):
        row = st.columns(4)
        layer = state.number(
            "Layer", 0, _layers(model) - 1, "train_layer", default=0, where=row[0], kind="number_input"
        )
        site = state.choose("Place", list(_SITES), "train_site", show=_SITES.__getitem__, where=row[1])
        kinds = [kind for kind in wb.coder_kinds() if kind != "discrete"]
        kind = state.choose("Kind", kinds, "train_kind", default="topk", where=row[2])
        features = state.choose(
            "Features", [64, 128, 256, 512, 1024, 2048, 4096], "train_features", default=256, where=row[3]
        )
        row = st.columns(4)
        steps = state.number(
            "Steps", 10, 20_000, "train_steps", default=100, where=row[0], kind="number_input", step=10
        )
        batch = state.choose("Tokens per step", [256, 512, 1024, 2048], "train_batch", default=512, where=row[1])
        own = ["its own texts"] if model in bundled() else []
        data = state.choose(
            "Texts", [*own, "mixture", "filler", *(f"task:{name}" for name in wb.tasks())], "train_data", where=row[2]
        )
        seed = state.number("Seed", 0, 999, "train_seed", default=0, where=row[3], kind="number_input")
        state.held("trains", _on, False, say=lambda on: "1" if on else "0")
        st.form_submit_button(
            "Train", on_click=state.put, args=("trains", True), type="primary", icon=":material/play_arrow:"
        )
    state.forget_unless("model of the training", model, ("trains",))
    if not st.session_state.get("trains"):
        st.info("Press Train: the coder is computed in the background and stays in the list of coders.")
        return
    asked = job("train_sae", model, seed=seed, site=f"blocks.{layer}.{site}", kind=kind, features=features, steps=steps,
                batch=batch, data=None if data in own else data)  # fmt: skip
    done = need(asked, "Training the coder")
    _trained(done, seed)


def _on(text: str) -> bool | None:
    return {"1": True, "0": False}.get(text)


def _layers(model: str) -> int:
    import json

    from workbench.jobs.revisions import model_folder

    folder = model_folder(model)
    config = {} if folder is None else json.loads((folder / "config.json").read_text())
    for name in ("layers", "num_hidden_layers", "n_layer"):
        if isinstance(config.get(name), int):
            return int(config[name])
    return 256


def _trained(done: Done, seed: int) -> None:
    table = done.table()
    row = st.columns(4)
    values = table.iloc[0]
    for column, name, said in ((row[0], "l0", "active per token"), (row[1], "fvu", "unexplained variance"),
                               (row[2], "dead", "never active")):  # fmt: skip
        column.metric(said, f"{values[name]:.3g}" if name == "l0" else f"{values[name]:.1%}", border=True)

    def look() -> None:
        state.put("coder", done.key)
        state.put("look", "features")

    row[3].button("See its features", on_click=look, type="primary", icon=":material/scatter_plot:")
    options = ", ".join(f"{name}={value!r}" for name, value in done.job.args.items() if name not in ("site", "data"))
    python = (
        f"import workbench as wb\nfrom workbench.apps.texts import texts_of\n\nmodel = wb.load({done.job.model!r})\n"
        f"texts, said = texts_of(model, {done.job.args.get('data')!r}, {seed})\n"
        f"coder = wb.train_sae(model, {done.job.args['site']!r}, texts, data=said, seed={seed}, {options})\n"
    )
    downloads(table, name="training", python=python)


guarded(page)
