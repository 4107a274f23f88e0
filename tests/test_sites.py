import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import UnknownName, WorkbenchError
from workbench.sites import Site


@st.composite
def sites(draw):
    kind = draw(st.sampled_from(Site.kinds()))
    layer = draw(st.integers(0, 99))
    try:
        site = Site(kind, layer)
    except WorkbenchError:
        site = Site(kind)
    try:
        return Site(
            site.kind,
            site.layer,
            draw(st.none() | st.integers(0, 63)),
            draw(st.sampled_from(["", "encoder", "vision"])),
        )
    except WorkbenchError:
        return site


@given(sites())
def test_text_round_trip(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


def test_names_are_transformerlens_names() -> None:
    assert str(Site("z", 3)) == "blocks.3.attn.hook_z"
    assert str(Site("z", layer=3, head=5)) == "blocks.3.attn.hook_z[5]"
    assert str(Site("resid_mid", 0)) == "blocks.0.hook_resid_mid"
    assert str(Site("mlp_post", 11)) == "blocks.11.mlp.hook_post"
    assert str(Site("final_norm")) == "ln_final.hook_normalized"
    assert str(Site("z", 1, stack="cross")) == "cross.blocks.1.attn.hook_z"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="patern", layer=1), "no site kind 'patern'; known: .*pattern"),
        (dict(kind="z"), "'z' needs a layer"),
        (dict(kind="embed", layer=1), "'embed' takes no layer"),
        (dict(kind="resid_pre", layer=1, head=0), "'resid_pre' has no head axis"),
        (dict(kind="z", layer=-1), "counts from 0"),
    ],
)
def test_malformed_sites_raise_at_construction(arguments, message) -> None:
    with pytest.raises(WorkbenchError, match=message):
        Site(**arguments)


@pytest.mark.parametrize(
    "text",
    ["blocks.1.attn.hook_patern", "hook_z", "blocks.x.attn.hook_z", "", "blocks.1.attn.hook_z[a]", "left.hook_embed"],
)
def test_unknown_text_lists_what_exists(text: str) -> None:
    with pytest.raises(UnknownName, match="blocks.<layer>.attn.hook_pattern"):
        Site.parse(text)
