import pytest
import torch

from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import compiled
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import Pairs


def native(seed=0, **options):
    """A small random native model in float64; ``linear=True`` switches attention to a causal mean and drops norm and MLP."""
    torch.manual_seed(seed)
    linear = options.pop("linear", False)
    sizes = {"layers": 2, "heads": 4, "width": 12, "head_width": 4, "vocab": 11, "kv_heads": 2, "mlp_width": 8}
    if linear:
        sizes |= {"kv_heads": None, "mlp_width": 0, "norm": "none", "positions": "none"}
    net = NativeNet(NativeConfig(**{**sizes, **options})).double()
    for name, parameter in net.named_parameters():
        if linear and name.endswith(("W_Q", "W_K")):
            parameter.data.zero_()
        elif parameter.ndim > 1:
            parameter.data.normal_(0, 0.6)
    return NativeModel(net.eval(), name="random")


def random_pairs(n=5, length=6, vocab=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 1:4] = torch.randint(vocab, (n, 3), generator=generator)
    ends = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n)])
    return Pairs(clean, corrupt, ends[:, :1], ends[:, 1:], torch.full((n,), length - 1))


@pytest.fixture(scope="session")
def make():
    return native


@pytest.fixture(scope="session")
def make_pairs():
    return random_pairs


@pytest.fixture(scope="session")
def hard():
    return compiled("compiled-induction", "hard", rotate=1)


@pytest.fixture(scope="session")
def soft():
    return compiled("compiled-induction", "soft", rotate=1)


@pytest.fixture(scope="session")
def induction(hard):
    return task("induction", length=12).build(seed=0, tokenizer=hard.tokenizer, n=6)
