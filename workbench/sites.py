"""Where a tensor lives in a model: TransformerLens's hook names as a frozen key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from workbench.errors import UnknownName, WorkbenchError

# kind -> (template, has a head axis). Templates without {l} are global.
_KINDS: dict[str, tuple[str, bool]] = {
    "embed": ("hook_embed", False),
    "pos_embed": ("hook_pos_embed", False),
    "resid_pre": ("blocks.{l}.hook_resid_pre", False),
    "attn_norm": ("blocks.{l}.ln1.hook_normalized", False),
    "q_input": ("blocks.{l}.hook_q_input", True),
    "k_input": ("blocks.{l}.hook_k_input", True),
    "v_input": ("blocks.{l}.hook_v_input", True),
    "q": ("blocks.{l}.attn.hook_q", True),
    "k": ("blocks.{l}.attn.hook_k", True),
    "v": ("blocks.{l}.attn.hook_v", True),
    "rot_q": ("blocks.{l}.attn.hook_rot_q", True),
    "rot_k": ("blocks.{l}.attn.hook_rot_k", True),
    "attn_scores": ("blocks.{l}.attn.hook_attn_scores", True),
    "pattern": ("blocks.{l}.attn.hook_pattern", True),
    "gate": ("blocks.{l}.attn.hook_gate", True),
    "z": ("blocks.{l}.attn.hook_z", True),
    "result": ("blocks.{l}.attn.hook_result", True),
    "lse": ("blocks.{l}.attn.hook_lse", True),
    "block_mass": ("blocks.{l}.attn.hook_block_mass", True),
    "block_max": ("blocks.{l}.attn.hook_block_max", True),
    "received": ("blocks.{l}.attn.hook_received", True),
    "entropy": ("blocks.{l}.attn.hook_entropy", True),
    "attn_out": ("blocks.{l}.hook_attn_out", False),
    "resid_mid": ("blocks.{l}.hook_resid_mid", False),
    "mlp_in": ("blocks.{l}.hook_mlp_in", False),
    "mlp_norm": ("blocks.{l}.ln2.hook_normalized", False),
    "mlp_pre": ("blocks.{l}.mlp.hook_pre", False),
    "mlp_post": ("blocks.{l}.mlp.hook_post", False),
    "mlp_out": ("blocks.{l}.hook_mlp_out", False),
    "resid_post": ("blocks.{l}.hook_resid_post", False),
    "final_norm": ("ln_final.hook_normalized", False),
}
# Kinds whose head axis is not axis 2.
_HEAD_AXIS = {"pattern": 1, "attn_scores": 1, "lse": 1, "block_mass": 1, "block_max": 1, "received": 1, "entropy": 1}
_BY_TEMPLATE = {template: kind for kind, (template, _) in _KINDS.items()}
_TEXT = re.compile(r"^(?:(?P<stack>encoder|decoder|cross|text|vision)\.)?(?P<body>[^\[\]]+)(?:\[(?P<head>\d+)\])?$")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the computation: ``Site("z", layer=3, head=5)`` is ``blocks.3.attn.hook_z[5]``.

    ``kind`` is one of ``Site.kinds()``. Kinds that belong to a layer need ``layer``; ``head`` selects one index of
    the head axis and is refused where there is none. ``stack`` names the half of a two-stack model
    (``encoder``, ``decoder``, ``cross``, ``text``, ``vision``) and is empty otherwise.

    Shapes: ``q k v z rot_*`` are ``[B, T, H or G, E]``; ``gate`` is ``[B, T, H]``;
    ``q_input k_input v_input result`` are ``[B, T, H or G, D]``; ``pattern attn_scores`` are ``[B, H, Q, K]``;
    ``block_mass block_max`` are ``[B, H, blocks, blocks]``; ``lse entropy received`` are ``[B, H, T]``; the rest
    ``[B, T, D]``.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    stack: str = ""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UnknownName("site kind", self.kind, _KINDS)
        template, has_heads = _KINDS[self.kind]
        if ("{l}" in template) != (self.layer is not None):
            need = "needs a layer" if "{l}" in template else "takes no layer"
            raise WorkbenchError(f"site kind {self.kind!r} {need}; got layer={self.layer}")
        if self.head is not None and not has_heads:
            raise WorkbenchError(f"site kind {self.kind!r} has no head axis; got head={self.head}")
        for name, value in (("layer", self.layer), ("head", self.head)):
            if value is not None and value < 0:
                raise WorkbenchError(f"{name} of a site counts from 0; got {value}")

    @staticmethod
    def kinds() -> list[str]:
        return list(_KINDS)

    @property
    def hook(self) -> str:
        """TransformerLens's hook name, without stack and head."""
        return _KINDS[self.kind][0].format(l=self.layer)

    @property
    def whole(self) -> Site:
        """The same site with all heads."""
        return Site(self.kind, self.layer, None, self.stack)

    @property
    def head_axis(self) -> int:
        """Axis of the head index in the tensor of this site."""
        return _HEAD_AXIS.get(self.kind, 2)

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        head = "" if self.head is None else f"[{self.head}]"
        return f"{stack}{self.hook}{head}"

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site written as ``blocks.3.attn.hook_z`` or ``blocks.3.attn.hook_z[5]``."""
        if isinstance(text, Site):
            return text
        match = _TEXT.match(text)
        if match:
            body = match["body"]
            numbered = re.match(r"^blocks\.(\d+)\.(.*)$", body)
            template = f"blocks.{{l}}.{numbered[2]}" if numbered else body
            if template in _BY_TEMPLATE:
                layer = int(numbered[1]) if numbered else None
                head = None if match["head"] is None else int(match["head"])
                return cls(_BY_TEMPLATE[template], layer, head, match["stack"] or "")
        raise UnknownName("site", text, (template.replace("{l}", "<layer>") for template in _BY_TEMPLATE))
