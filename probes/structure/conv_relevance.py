"""From which pixels does a convolutional network have its answer?

Layer-wise relevance propagation (Bach et al. 2015): the logit is handed back layer by layer, to the inputs of each layer in
proportion to what they gave. With a the inputs of a layer of weights w and biases b, and z_o = sum_i a_i w_io + b_o,

    R_i = sum_o a_i w_io R_o / z_o,

with a stabiliser added to z (``epsilon``), with w + gamma max(0, w) in the place of w (``gamma``, Montavon et al. 2019), or
with positive and negative contributions apart, which get alpha and 1 - alpha of R_o (``alpha-beta``; all of it goes to one
sign where the other is absent). ReLU hands relevance through, max pooling gives it to the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.ablation import AblationCurve
from workbench.probes.catalogue import Analysis
from workbench.results import Result, axis
from workbench.run import Provenance, versions

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RULES = ("epsilon", "gamma", "alpha-beta")
_LINEAR = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_WINNER = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_THROUGH = (nn.ReLU, nn.Dropout, nn.Dropout2d, nn.Identity)


@dataclass(frozen=True)
class PixelMaps(Result):
    """``maps`` ``[N, H, W]``, one number per pixel, and ``null`` ``[N, H, W]``, the same of the network with each layer's weights
    permuted. ``target`` ``[N]`` and its ``logit`` ``[N]``; ``conserved`` ``[N]``: the sum of the relevance map as a share of the
    logit, NaN where that is 0."""

    title: str
    unit: str
    maps: Tensor
    null: Tensor
    target: Tensor
    logit: Tensor
    conserved: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("network of convolutions"))

    def frame(self) -> pd.DataFrame:
        """One row per image: ``image, target, logit, conserved``, place (``row, column``) and value of the ``largest`` pixel, and
        ``half``, the smallest part of the pixels with half of the positive mass, with its null."""
        import pandas as pd

        width = self.maps.shape[2]
        best = self.maps.flatten(1).argmax(1)
        return pd.DataFrame(
            {
                "image": range(len(self.maps)),
                "target": self.target.numpy(),
                "logit": self.logit.numpy(),
                "conserved": self.conserved.numpy(),
                "row": (best // width).numpy(),
                "column": (best % width).numpy(),
                "largest": self.maps.flatten(1).amax(1).numpy(),
                "half": _half(self.maps).numpy(),
                "half_null": _half(self.null).numpy(),
            }
        )

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """One image's map; red speaks for the target."""
        ax = axis(ax, 4.4, 4.0)
        values = self.maps[image]
        most = float(values.abs().max()) or 1.0
        shown = ax.imshow(values.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        ax.figure.colorbar(shown, ax=ax, label=self.unit)
        ax.set(xlabel="pixels", ylabel="pixels", title=f"{self.title}, class {int(self.target[image])}")
        return ax


@torch.no_grad()
def relevance_map(
    cnn: nn.Sequential,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    rule: str = "epsilon",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    alpha: float = 2.0,
    seed: int = 0,
) -> PixelMaps:
    """Relevance of every pixel of ``images`` ``[N, C, H, W]`` to a class's logit, summed over channels, in logits.

    ``cnn``: an ``nn.Sequential`` in eval mode of Conv2d, BatchNorm2d behind them (folded in), Linear, ReLU, MaxPool2d, AvgPool2d,
    their adaptive forms, Flatten, Dropout and Identity, nested as you like. ``target``: a class, or one per image, by default the
    network's answer. ``epsilon`` is a part of the mean size of a layer's outputs. Biases take relevance and keep it: without them
    ``epsilon`` near 0 gives maps that sum to the logit.
    """
    if rule not in RULES:
        raise UnknownName("rule", rule, RULES)
    if not epsilon >= 0 or not gamma >= 0 or not alpha >= 1:
        raise WorkbenchError(f"epsilon and gamma are at least 0, alpha at least 1; got {epsilon}, {gamma}, {alpha}")
    layers = layers_of(cnn)
    _check_images(images)
    step = {
        "epsilon": lambda layer, a, r: _shared(layer, a, r, lambda w: w, epsilon),
        "gamma": lambda layer, a, r: _shared(layer, a, r, lambda w: w + gamma * _positive(w), epsilon),
        "alpha-beta": lambda layer, a, r: _apart(layer, a, r, alpha, epsilon),
    }[rule]
    maps, logit, wanted = _propagated(layers, images, target, step)
    null, _, _ = _propagated(_permuted(layers, seed), images, wanted, step)
    total = maps.flatten(1).sum(1)
    return PixelMaps(
        f"Relevance of pixels ({rule})",
        "logits",
        maps,
        null,
        wanted,
        logit,
        torch.where(logit == 0, float("nan"), total / logit),
        Provenance("network of convolutions", dtype=str(images.dtype).removeprefix("torch."), versions=versions()),
    )


@torch.no_grad()
def pixel_deletion(
    cnn: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    *,
    counts: Sequence[int] = (4, 16, 64),
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """The class's logit as the pixels of largest ``maps`` ``[N, H, W]`` become the mean of their image, and as random ones do."""
    _check_images(images)
    n, height, width = len(images), *images.shape[2:]
    if tuple(maps.shape) != (n, height, width):
        raise WorkbenchError(f"maps are [N, H, W] = {[n, height, width]}; got {list(maps.shape)}")
    if not counts or min(counts) < 1 or max(counts) > height * width or random < 1:
        raise WorkbenchError(
            f"counts lie between 1 and {height * width} pixels, random is 1 or more; got {list(counts)}, {random}"
        )
    plain = cnn(images)
    wanted = _targets(plain, target)
    mean = images.mean((2, 3), keepdim=True)
    generator = torch.Generator().manual_seed(seed)

    def left(order: Tensor) -> Tensor:
        ranks = order.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).view(n, 1, height, width)
        found = [cnn(torch.where(ranks < count, mean, images)) for count in counts]
        return torch.stack([logits.gather(1, wanted[:, None])[:, 0].double() for logits in found])

    drawn = torch.stack([left(torch.rand(maps.shape, generator=generator)) for _ in range(random)])
    return AblationCurve(
        "logit of the class",
        "pixels become the image's mean",
        tuple(counts),
        plain.gather(1, wanted[:, None])[:, 0].double(),
        left(maps.double()),
        drawn,
        tuple(f"pixel ranked {i + 1}" for i in range(max(counts))),
        Provenance("network of convolutions"),
    )


def layers_of(cnn: nn.Sequential) -> list[nn.Module]:
    """The layers of a network in a row, batch norms folded into the convolutions before them; others are refused by name."""
    if not isinstance(cnn, nn.Sequential):
        raise Refused(f"relevance is propagated through an nn.Sequential; got a {type(cnn).__name__}")
    if cnn.training:
        raise WorkbenchError("the network is in training mode; call .eval() first")
    found: list[nn.Module] = []
    for name, layer in _flat(cnn):
        if isinstance(layer, nn.BatchNorm2d):
            if not found or not isinstance(found[-1], nn.Conv2d):
                raise Refused(f"layer {name} is a BatchNorm2d that follows no Conv2d, into which it could be folded")
            found[-1] = fuse_conv_bn_eval(found[-1], layer)
        elif isinstance(layer, (*_LINEAR, *_WINNER, *_THROUGH, nn.Flatten)):
            found.append(layer)
        else:
            raise Refused(f"layer {name} is a {type(layer).__name__}, for which relevance has no rule")
    if not any(isinstance(layer, nn.Conv2d | nn.Linear) for layer in found):
        raise Refused("the network has no Conv2d and no Linear layer")
    return found


def _flat(cnn: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, layer in cnn.named_children():
        full = f"{prefix}{name}"
        found += _flat(layer, f"{full}.") if isinstance(layer, nn.Sequential) else [(full, layer)]
    return found


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or not images.numel():
        raise WorkbenchError(f"images are floating point [N, C, H, W]; got {images.dtype} {list(images.shape)}")


def _targets(logits: Tensor, target: Any) -> Tensor:
    if logits.ndim != 2:
        raise Refused(f"a network that names classes gives logits [N, classes]; this one gives {list(logits.shape)}")
    wanted = logits.argmax(1) if target is None else torch.as_tensor(target).expand(len(logits)).long()
    if bool((wanted < 0).any()) or bool((wanted >= logits.shape[1]).any()):
        raise WorkbenchError(f"target is a class from 0 to {logits.shape[1] - 1}; got {wanted.tolist()}")
    return wanted


Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _propagated(layers: list[nn.Module], images: Tensor, target: Any, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [images]
    for layer in layers:
        inputs.append(layer(inputs[-1]))
    logits = inputs.pop()
    wanted = _targets(logits, target)
    chosen = torch.nn.functional.one_hot(wanted, logits.shape[1]).to(logits.dtype)
    relevance = logits * chosen
    for layer, a in zip(reversed(layers), reversed(inputs), strict=True):
        if isinstance(layer, _LINEAR):
            relevance = step(layer, a, relevance)
        elif isinstance(layer, _WINNER):
            relevance = _transposed(layer, a, relevance)
        elif isinstance(layer, nn.Flatten):
            relevance = relevance.view(a.shape)
    return relevance.sum(1).double(), (logits * chosen).sum(1).double(), wanted


def _transposed(act: Callable[[Tensor], Tensor], a: Tensor, r: Tensor) -> Tensor:
    """r taken back through the derivative of ``act`` at a."""
    with torch.enable_grad():
        x = a.detach().requires_grad_()
        return torch.autograd.grad(act(x), x, r)[0]


def _weighed(layer: nn.Module, change: Callable[[Tensor], Tensor], bias: bool = True) -> Callable[[Tensor], Tensor]:
    """The layer with its weights and biases changed; the even weights of mean pooling stay (their scale cancels)."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return layer
    changed = {name: change(value) for name, value in layer.named_parameters()}
    if not bias and "bias" in changed:
        changed["bias"] = torch.zeros_like(changed["bias"])
    return lambda x: torch.func.functional_call(layer, changed, (x,))


def _ratio(r: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """r / z, with z moved away from 0; nothing where z is 0, which nothing has given to."""
    z = z + torch.where(z < 0, -1.0, 1.0) * epsilon * z.abs().mean()
    return torch.where(z == 0, torch.zeros_like(z), r / torch.where(z == 0, 1.0, z))


def _shared(layer: nn.Module, a: Tensor, r: Tensor, change: Callable[[Tensor], Tensor], epsilon: float) -> Tensor:
    act = _weighed(layer, change)
    return a * _transposed(act, a, _ratio(r, act(a), epsilon))


def _apart(layer: nn.Module, a: Tensor, r: Tensor, alpha: float, epsilon: float) -> Tensor:
    """Positive contributions get alpha of the relevance, negative ones 1 - alpha; all of it where the others are absent."""
    up, down = a.clamp(min=0), a.clamp(max=0)
    acts = [_weighed(layer, change, bias=False) for change in (_positive, _negative)]
    weighed = isinstance(layer, nn.Conv2d | nn.Linear)
    pairs = [[(acts[0], up)], [(acts[0], down)]]
    if weighed:
        pairs = [[(acts[0], up), (acts[1], down)], [(acts[1], up), (acts[0], down)]]
    z = [torch.stack([act(x) for act, x in part]).sum(0) for part in pairs]
    bias = getattr(layer, "bias", None)
    if bias is not None:
        spread = bias.view(-1, *[1] * (z[0].ndim - 2))
        z = [z[0] + _positive(spread), z[1] + _negative(spread)]
    shares = (torch.where(z[1] == 0, 1.0, alpha), torch.where(z[0] == 0, 1.0, 1 - alpha))
    found = torch.zeros_like(a)
    for part, total, share in zip(pairs, z, shares, strict=True):
        ratio = _ratio(share * r, total, epsilon)
        for act, x in part:
            found = found + x * _transposed(act, x, ratio)
    return found


def _positive(w: Tensor) -> Tensor:
    return w.clamp(min=0)


def _negative(w: Tensor) -> Tensor:
    return w.clamp(max=0)


def _permuted(layers: list[nn.Module], seed: int) -> list[nn.Module]:
    """The network with the weights of each layer in another order."""
    from copy import deepcopy

    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in layers:
        made = deepcopy(layer)
        if isinstance(made, nn.Conv2d | nn.Linear):
            weight = made.weight.data
            made.weight.data = weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(weight)
        found.append(made)
    return found


def _half(maps: Tensor) -> Tensor:
    mass = maps.flatten(1).clamp(min=0).sort(dim=1, descending=True).values
    total = mass.sum(1, keepdim=True)
    needed = (mass.cumsum(1) < total / 2).sum(1) + 1
    return torch.where(total[:, 0] > 0, needed / maps[0].numel(), float("nan"))


def templates() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that needs no training, two images for it, and the masks of what they show: each of its kernels is one of two
    shapes less its mean, and the largest response anywhere is the shape's logit."""
    bars = torch.zeros(2, 1, 5, 5)
    bars[0, :, 2], bars[1, :, :, 2] = 1.0, 1.0
    conv = nn.Conv2d(1, 2, 5, bias=False)
    conv.weight.data = bars - bars.mean((2, 3), keepdim=True)
    cnn = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    cnn[4].weight.data = torch.eye(2)
    images = 0.1 * torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    for i in range(2):
        images[i, :, 3 + i : 8 + i, 7:12] += bars[i]
        masks[i, 3 + i : 8 + i, 7:12] = True
    return cnn.eval(), images, masks


def _example() -> dict[str, Any]:
    cnn, images, _ = templates()
    return {"cnn": cnn, "images": images}


ANALYSES = (
    Analysis(
        name="pixel-relevance",
        question="From which pixels does a convolutional network have its answer?",
        function=relevance_map,
        example=_example,
        paper="Bach et al. 2015 (PLOS ONE 10(7) e0130140), section on layer-wise relevance propagation",
        source="tensors",
        null="the network with each layer's weights permuted",
        cause="workbench.probes.structure.conv_relevance.pixel_deletion",
        definition="alpha-beta gives all relevance to one sign where the other is absent",
    ),
)
