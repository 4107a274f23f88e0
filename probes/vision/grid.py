"""How do the tokens of a map lie in the image?

Every analysis of this folder reads a ``Grid``: rows and columns of patches, their size in pixels, and where they stand among
the tokens. ``grid_of`` finds it for a model: from its configuration and from the tokens it keeps beside the patches (class,
distillation, registers), or, for models that read text and images, from the run of image tokens in the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.protocol import Model, Tokens

if TYPE_CHECKING:
    import pandas as pd

_CLS = ("cls_token", "class_embedding", "class_token")
_OTHERS = ("distillation_token", "dist_token", "register_tokens", "reg_token")


@dataclass(frozen=True)
class Grid:
    """Patches in rows from the top left, each row from left to right.

    ``patch`` is a patch's (height, width) in pixels. ``start`` is the token of the first patch, ``cls`` the class token's place
    or None, ``others`` the places of further tokens of the encoder that are no patches (distillation, registers). ``step``
    tokens lie between the starts of two rows: ``cols`` unless a row ends with a token of its own, as the newlines of LLaVA-NeXT
    do. ``tokens`` is how many tokens the map has: None if any number may follow, as text does. ``stack`` names the half of a
    two-stack model that the grid belongs to (``vision``, ``text``).
    """

    rows: int
    cols: int
    patch: tuple[int, int] = (1, 1)
    start: int = 0
    cls: int | None = None
    others: tuple[int, ...] = ()
    step: int = 0
    tokens: int | None = None
    stack: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", self.step or self.cols)
        object.__setattr__(self, "patch", (int(self.patch[0]), int(self.patch[1])))
        sizes = (self.rows, self.cols, *self.patch)
        if min(sizes) < 1 or self.start < 0 or self.step < self.cols:
            raise WorkbenchError(
                f"a grid has rows, columns and patches of one pixel or more, and rows that do not overlap; got {self!r}"
            )
        taken = set(self.index.tolist())
        for place in (self.cls, *self.others):
            if place is not None and (place < 0 or place in taken):
                raise WorkbenchError(
                    f"token {place} is a patch or none; it cannot stand beside the patches of {self!r}"
                )
        if self.tokens is not None and self.tokens <= max(*self.index.tolist(), self.cls or 0, *self.others):
            raise WorkbenchError(f"{self!r} has patches after its {self.tokens} tokens")

    @property
    def patches(self) -> int:
        """How many patches, N = rows * cols."""
        return self.rows * self.cols

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels, as far as patches cover it."""
        return self.rows * self.patch[0], self.cols * self.patch[1]

    @property
    def index(self) -> Tensor:
        """The token of every patch, ``[N]``."""
        return self.start + (self.step * torch.arange(self.rows)[:, None] + torch.arange(self.cols)).flatten()

    @property
    def places(self) -> Tensor:
        """Row and column of every patch, ``[N, 2]``."""
        return torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.cols)).reshape(-1, 2)

    @property
    def centres(self) -> Tensor:
        """Pixel coordinates (down, right) of the middle of every patch, ``[N, 2]`` in float64."""
        return (self.places.double() + 0.5) * torch.tensor(self.patch, dtype=torch.float64)

    def check(self, tokens: int, what: str = "this map") -> None:
        """Raise unless a sequence of so many tokens has these patches."""
        last = max([int(self.index[-1]), *self.others])
        if (self.tokens is not None and tokens != self.tokens) or tokens <= last:
            least = f"{self.tokens}" if self.tokens is not None else f"at least {last + 1}"
            raise WorkbenchError(
                f"{what} has {tokens} tokens; a grid of {self.rows} x {self.cols} patches that starts at token {self.start} "
                f"needs {least}. Name the grid with Grid(rows, cols, start=...), or take it from the model with grid_of(model)"
            )

    def of_tokens(self, values: Tensor) -> Tensor:
        """The patches among the tokens of the last axis: ``[..., T]`` to ``[..., N]``."""
        self.check(values.shape[-1], "this tensor")
        return values[..., self.index.to(values.device)]

    def image(self, values: Tensor) -> Tensor:
        """One number per patch, ``[..., N]``, as ``[..., rows, cols]``."""
        if values.shape[-1] != self.patches:
            raise WorkbenchError(
                f"an image of {self.patches} patches takes [..., {self.patches}]; got {list(values.shape)}"
            )
        return values.unflatten(-1, (self.rows, self.cols))

    def pixels(self, values: Tensor) -> Tensor:
        """One number per patch, ``[..., N]``, repeated over the pixels of the patch: ``[..., height, width]``."""
        return self.image(values).repeat_interleave(self.patch[0], -2).repeat_interleave(self.patch[1], -1)

    def table(self, columns: Mapping[str, Tensor]) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column``, then the columns, each ``[B, N]``."""
        import pandas as pd

        batch = len(next(iter(columns.values())))
        places = self.places.repeat(batch, 1)
        at = {
            "image": torch.arange(batch).repeat_interleave(self.patches).numpy(),
            "patch": torch.arange(self.patches).repeat(batch).numpy(),
            "row": places[:, 0].numpy(),
            "column": places[:, 1].numpy(),
        }
        return pd.DataFrame(at | {name: values.flatten().numpy() for name, values in columns.items()})

    def covered(self, mask: Tensor) -> Tensor:
        """Share of every patch that a mask covers, ``[..., N]`` in float64.

        ``mask`` is of pixels, ``[..., height, width]``, or of patches, ``[..., rows, cols]`` or ``[..., N]``."""
        values = mask.detach().cpu().double()
        if values.ndim >= 2 and tuple(values.shape[-2:]) == self.size:
            cells = values.unflatten(-1, (self.cols, -1)).unflatten(-3, (self.rows, -1))
            return cells.mean((-3, -1)).flatten(-2)
        if values.ndim >= 2 and tuple(values.shape[-2:]) == (self.rows, self.cols):
            return values.flatten(-2)
        if values.shape[-1] == self.patches:
            return values
        raise WorkbenchError(
            f"a mask is of pixels [..., {self.size[0]}, {self.size[1]}] or of patches [..., {self.rows}, {self.cols}]; "
            f"got {list(mask.shape)}"
        )


def grid_of(model: Model, inputs: Any = None, *, stack: str | None = None, image: int | None = None) -> Grid:
    """The grid of a model's maps.

    A native model of images and an image encoder of Hugging Face (ViT, DeiT, DINO, CLIP's and SigLIP's towers) tell it
    themselves; ``inputs`` with ``pixel_values`` of another size than the configuration's are counted instead. For a model that
    reads images inside of a text (LLaVA, Qwen-VL) ``stack="text"`` gives where the image's tokens stand in the text, which
    needs ``inputs`` with ``input_ids``; of several images ``image`` says which. ``stack="vision"`` is its encoder.
    Raises ``Refused`` for models whose tokens do not lie in one grid (windows, several stages).
    """
    if isinstance(model, NativeModel):
        native = model.net.config
        if native.grid is None:
            raise Refused(f"{model.name} reads text, not images")
        rows, cols = native.grid
        return Grid(rows, cols, (native.patch, native.patch), tokens=rows * cols)
    module = getattr(model, "model", None)
    config = getattr(module, "config", None)
    if config is None:
        raise Refused(f"{model.name} says nothing about patches; pass Grid(rows, cols, patch, start=...)")
    given = _inputs(inputs)
    if stack is None:
        stack = "text" if _image_token(config) is not None and "input_ids" in given else "vision"
    if stack not in ("vision", "text"):
        raise UnknownName("stack with an image", stack, ("vision", "text"))
    found = _vision_grid(model.name, module, config, given)
    if stack == "text":
        found = _text_grid(model.name, config, given, found, image)
    stacks = {str(record.layer).split(".")[0] for record in model.manifest().layers if isinstance(record.layer, str)}
    return replace(found, stack=stack if stack in stacks else "")


def _inputs(inputs: Any) -> Mapping[str, Tensor]:
    if inputs is None:
        return {}
    if isinstance(inputs, Tokens):
        return {"input_ids": inputs.ids, **inputs.inputs} if inputs.ids.shape[1] else inputs.inputs
    if isinstance(inputs, Mapping):
        return inputs
    if isinstance(inputs, Tensor):
        return {"pixel_values": inputs} if inputs.is_floating_point() else {"input_ids": inputs}
    raise WorkbenchError(f"inputs are what model.run takes; got {type(inputs).__name__}")


def _vision_grid(name: str, module: Any, config: Any, given: Mapping[str, Tensor]) -> Grid:
    own = getattr(config, "vision_config", None) or config
    image, patch = getattr(own, "image_size", None), getattr(own, "patch_size", None)
    if getattr(own, "depths", None) is not None:
        raise Refused(f"{name} has stages of different grids; pass Grid(rows, cols, patch) of the layer you mean")
    if patch is None:
        raise Refused(f"{name} has no patch_size; it reads no images, or pass Grid(rows, cols, patch, start=...)")
    high, wide = _pair(patch)
    prefix = _prefix(module)
    start = sum(prefix)
    if "image_grid_thw" in given:
        times, rows, cols = (int(n) for n in given["image_grid_thw"].reshape(-1, 3)[0])
        if times != 1:
            raise Refused(f"{name} was given a video of {times} frames; a grid is of one image")
        return Grid(rows, cols, (high, wide), start)
    pixels = given.get("pixel_values")
    if pixels is not None and pixels.ndim >= 4:
        height, width = pixels.shape[-2:]
    elif image is not None:
        height, width = _pair(image)
    else:
        raise Refused(f"{name} reads images of any size; pass the inputs too: grid_of(model, inputs)")
    rows, cols = height // high, width // wide
    cls = 0 if prefix[0] else None
    return Grid(rows, cols, (high, wide), start, cls, tuple(range(prefix[0], start)), tokens=start + rows * cols)


def _prefix(module: Any) -> tuple[int, int]:
    """How many class tokens and how many others a model keeps in front of its patches: those it has parameters for."""
    found = {}
    for path, weight in module.named_parameters():
        leaf = path.rsplit(".", 1)[-1]
        if leaf in _CLS + _OTHERS:
            found[leaf] = 1 if weight.ndim < 2 else weight.shape[-2]
    return int(any(leaf in found for leaf in _CLS)), sum(found.get(leaf, 0) for leaf in _OTHERS)


def _text_grid(name: str, config: Any, given: Mapping[str, Tensor], vision: Grid, image: int | None) -> Grid:
    token = _image_token(config)
    if token is None or "input_ids" not in given:
        raise Refused(
            f"where an image stands in the text is read off the input ids; {name} has "
            + ("no image token" if token is None else "them in inputs: grid_of(model, inputs)")
        )
    spans = [image_spans(row, token) for row in torch.atleast_2d(torch.as_tensor(given["input_ids"]))]
    if any(found != spans[0] for found in spans):
        raise Refused("the sequences of this batch hold their images at different tokens; analyse them one by one")
    if not spans[0]:
        raise Refused(f"the text holds no image token (id {token})")
    if image is None and len(spans[0]) > 1:
        raise WorkbenchError(f"the text holds {len(spans[0])} images; say which with image=0 ... {len(spans[0]) - 1}")
    if not 0 <= (image or 0) < len(spans[0]):
        raise UnknownName("image of the text", image, range(len(spans[0])))
    begin, end = spans[0][image or 0]
    return _fitted(vision, begin, end - begin)


def _fitted(vision: Grid, begin: int, count: int) -> Grid:
    """The grid of ``count`` image tokens: the encoder's patches, with their class token if there is one more, merged k x k if
    there are k^2 times fewer."""
    if count == vision.patches + 1 and vision.cls is not None:
        return Grid(vision.rows, vision.cols, vision.patch, begin + 1, begin)
    merged = math.isqrt(vision.patches // count) if count <= vision.patches else 0
    if merged and vision.rows // merged * (vision.cols // merged) == count:
        high, wide = vision.patch
        return Grid(vision.rows // merged, vision.cols // merged, (high * merged, wide * merged), begin)
    raise Refused(
        f"the text holds {count} image tokens and the encoder {vision.rows} x {vision.cols} patches: how these lie is not "
        f"known; pass Grid(rows, cols, patch, start={begin})"
    )


def image_spans(ids: Tensor, token: int) -> list[tuple[int, int]]:
    """Runs ``[lo, hi)`` of one token in ``ids`` ``[T]``: where images stand in a text."""
    hits = torch.nn.functional.pad((ids == token).long(), (1, 1)).diff()
    return list(zip((hits == 1).nonzero()[:, 0].tolist(), (hits == -1).nonzero()[:, 0].tolist(), strict=True))


def _image_token(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    return None


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
