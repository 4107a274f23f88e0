"""Small models, pairs and dictionaries of the tests of feature circuits."""

from __future__ import annotations

import torch
import transformers as hf
from random_nets import DECODER, net

from workbench.coders.catalogue import make_coder
from workbench.models.hf import HFModel
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import Pairs

VOCAB = 11


def native(seed: int = 0, **options) -> NativeModel:
    """A small random native model in float64; ``linear=True`` switches attention to a causal mean and drops norm and MLP."""
    torch.manual_seed(seed)
    linear = options.pop("linear", False)
    sizes = {"layers": 2, "heads": 2, "width": 8, "head_width": 4, "vocab": VOCAB, "mlp_width": 12}
    if linear:
        sizes |= {"mlp_width": 0, "norm": "none", "positions": "none"}
    made = NativeNet(NativeConfig(**{**sizes, **options})).double()
    for name, parameter in made.named_parameters():
        if linear and name.endswith(("W_Q", "W_K")):
            parameter.data.zero_()
        elif parameter.ndim > 1:
            parameter.data.normal_(0, 0.5)
    return NativeModel(made.eval().requires_grad_(False), name="random")


def hugging(cls: str = "LlamaForCausalLM", config: str = "LlamaConfig", **options) -> HFModel:
    made = net(getattr(hf, cls), getattr(hf, config)(**{**DECODER, **options}))
    return HFModel(made, name=cls)


def pairs_of(n: int = 5, length: int = 6, vocab: int = VOCAB, seed: int = 0, low: int = 0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(low, vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 1:4] = torch.randint(low, vocab, (n, 3), generator=generator)
    ends = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n)])
    spans = {"early": torch.tensor([[1, 3]] * n), "END": torch.tensor([[length - 1, length]] * n)}
    return Pairs(clean, corrupt, ends[:, :1], ends[:, 1:], torch.full((n,), length - 1), spans)


def coder(width: int, features: int = 24, seed: int = 0, kind: str = "topk", **options):
    """A random dictionary in float64 with biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("topk", "batchtopk", "matryoshka"):
        options = {"k": 4, **options}
    made = make_coder(kind, width, features, generator=generator, **options).double()
    with torch.no_grad():
        made.b_dec.copy_(torch.randn(width, generator=generator) * 0.3)
        made.b_enc.copy_(torch.rand(features, generator=generator) * 0.2)
    return made.requires_grad_(False)


def axes(rows: torch.Tensor, both: bool = True):
    """A dictionary whose directions are ``rows``, orthonormal, and (``both``) their opposites; it leaves no error."""
    rows = torch.cat([rows, -rows]) if both else rows
    made = make_coder("relu", rows.shape[1], len(rows)).to(rows.dtype)
    with torch.no_grad():
        made.W_dec.copy_(rows), made.W_enc.copy_(rows.T)
        made.b_dec.zero_(), made.b_enc.zero_()
    return made.requires_grad_(False)


def written() -> tuple[NativeModel, Pairs, dict]:
    """Two MLPs and nothing else on a stream of two coordinates, and one pair of prompts of one token, (1, 2) and (3, 1).

    ::

        stream in     (p, q)
        MLP 0         (p, p + 2q)
        stream after  (a, b) = (2p, p + 3q)
        MLP 1         (3b, a)
        stream after  (a + 3b, a + b)
        metric        2 first + second = 3a + 7b = 13p + 21q
    """
    config = NativeConfig(
        layers=2, heads=1, width=2, head_width=2, vocab=4, mlp_width=2, norm="none", positions="none", activation="relu"
    )
    made = NativeNet(config).double()
    for parameter in made.parameters():
        parameter.data.zero_()
    state = made.state_dict()
    for name, rows in {
        "W_E": [[0, 0], [1, 2], [3, 1], [0, 0]],
        "blocks.0.mlp.W_in": [[1, 0], [0, 2]],
        "blocks.0.mlp.W_out": [[1, 1], [0, 1]],
        "blocks.1.mlp.W_in": [[0, 1], [1, 0]],
        "blocks.1.mlp.W_out": [[3, 0], [0, 1]],
        "W_U": [[0, 0, 0, 2], [0, 0, 0, 1]],
    }.items():
        state[name].copy_(torch.tensor(rows, dtype=torch.float64))
    pairs = Pairs(torch.tensor([[1]]), torch.tensor([[2]]), torch.tensor([[3]]), torch.tensor([[0]]), torch.tensor([0]))
    eye = axes(torch.eye(2, dtype=torch.float64), both=False)
    sites = ("0.hook_resid_pre", "0.hook_mlp_out", "0.hook_resid_post", "1.hook_mlp_out", "1.hook_resid_post")
    model = NativeModel(made.eval().requires_grad_(False), name="written")
    return model, pairs, {f"blocks.{site}": eye for site in sites}
