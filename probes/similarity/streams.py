"""Do the tokens of a residual stream become alike with depth?

For the stream X of a layer, real tokens x width,

    residual = |X - 1 x^T| / |X|,  x = the mean token        (Dong et al., arXiv 2103.03404; Frobenius norms)

is 0 if all tokens are equal, and the effective rank exp(entropy(s / sum s)) of its singular values is 1 then. Attention alone
collapses streams doubly exponentially with depth; skip connections and MLPs hold against it. A large residual stream of a sink
token also lowers the effective rank: one long token is one direction.

The null are independent Gaussian tokens of the same number and width: residual sqrt(1 - 1/n), the effective rank of a drawn one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import UnknownName
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled_run
from workbench.probes.similarity.rank import spectrum_measures
from workbench.probes.sources import real_tokens, sites_read
from workbench.probes.tables import LayerTable
from workbench.run import Run

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def stream_collapse(run: Run, *, site: str = "resid_post", seed: int = 0) -> LayerTable:
    """``residual``, ``effective_rank``, ``rank95`` and ``rank99`` of what ``run`` read at ``site`` of each layer, means over
    sequences with 95% intervals.

    The run must have read ``blocks.{l}.hook_resid_post`` (or the hook of another ``site``: ``resid_pre``, ``resid_mid``,
    ``attn_out``, ``mlp_out``). Padding does not count; a sequence of one token has no residual worth the name: NaN.
    """
    if site not in KINDS:
        raise UnknownName("site of a stream", site, KINDS)
    each: dict[str, dict[int | str, Tensor]] = {}
    null: dict[str, dict[int | str, Tensor]] = {}
    undefined = {}
    for name, stream in sites_read(run, site).items():
        x, real = stream.cpu().double(), real_tokens(run, stream)
        for store, values in ((each, x), (null, _noise(x, real, seed))):
            for measure, numbers in _measures(values, real).items():
                store.setdefault(measure, {})[name] = numbers
        if bool((real.sum(1) < 2).any()):
            undefined[str(name)] = "one token is not compared with others"
    return LayerTable.averaged(
        f"Collapse of {site}",
        each,
        {
            "residual": "share of the stream's norm",
            "effective_rank": "directions",
            "rank95": "singular values",
            "rank99": "singular values",
        },
        null=null,
        undefined=undefined,
        provenance=run.provenance,
    )


def _noise(x: Tensor, real: Tensor, seed: int) -> Tensor:
    """Gaussian real tokens, the same for every sequence of the same number."""
    out = torch.zeros_like(x)
    for count in real.sum(1).unique().tolist():
        here = real & (real.sum(1, keepdim=True) == count)
        draw = torch.randn(count, x.shape[2], dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        out[here] = draw.repeat(int(here.any(1).sum()), 1)
    return out


def _measures(x: Tensor, real: Tensor) -> dict[str, Tensor]:
    x = x.masked_fill(~real[..., None], 0.0)
    count = real.sum(1).double()
    energy, total = x.square().sum((1, 2)), x.sum(1)
    left = (energy - total.square().sum(1) / count.clamp(min=1)).clamp(min=0)
    lonely = count < 2
    found = {"residual": (left / energy).sqrt()} | spectrum_measures(torch.linalg.svdvals(x))
    return {key: part.masked_fill(lonely, float("nan")) for key, part in found.items()}


ANALYSES = (
    Analysis(
        name="stream-collapse",
        question="Do the tokens of a residual stream become alike with depth?",
        function=stream_collapse,
        example=lambda: {"run": bundled_run(read=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(4)))},
        paper="Dong et al. 2021 (arXiv 2103.03404), residual; iLLaMA 2024 (arXiv 2404.06773), abstract",
        source="run",
        null="independent Gaussian tokens of the same number and width",
        definition="Residual in Frobenius norm, from the mean token.",
        reads=("blocks.{l}.hook_resid_post",),
    ),
)
