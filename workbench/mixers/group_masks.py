"""Softmax inside of groups that are not places: instances and types, prompts of a token, shuffled segments.

Group Pose  N instances of K + 1 tokens (an instance and its K keypoints): first within an instance, then across instances
            among tokens of one type
TCPA        every token sees all tokens of the image and the prompts chosen for it; prompts of [CLS] and of image tokens apart
RelaCtrl    TDSM: tokens are shuffled, cut into segments, attend inside of them, and are put back
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import flash_attention
from workbench.mixers.local import check_qkv, grouped_softmax
from workbench.mixers.windows import at_least_one, check_square
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def within_instance_attention(
    q: Tensor, k: Tensor, v: Tensor, *, instances: int, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """First self-attention of a Group Pose decoder: the keypoint queries and the instance query of one instance.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; the tokens of an instance stand together, N is ``instances``
    times the number of types. Source: Liu et al., arXiv:2308.07313.
    """
    groups = _instances(q, k, v, instances)
    return grouped_softmax(q, k, v, groups, groups, scale=scale)


def across_instance_attention(
    q: Tensor, k: Tensor, v: Tensor, *, instances: int, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """Second self-attention of a Group Pose decoder: tokens of one type (one keypoint, or the instance query) of all
    instances. Arguments as in ``within_instance_attention``."""
    groups = _instances(q, k, v, instances).transpose(2, 3)
    return grouped_softmax(q, k, v, groups, groups, scale=scale)


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, *, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Token coordinated prompt attention (TCPA): keys are [CLS], P prompts, then the image tokens; each query sees all but
    the prompts that were not chosen for it.

    q ``[B, H, 1 + N, E]`` ([CLS] first), k ``[B, G, 1 + P + N, E]``, v ``[B, G, 1 + P + N, V]``; ``prompts`` bool
    ``[B, 1 + N, P]`` (see ``choose_prompts``). Source: the released code of #9.
    """
    check_qkv(q, k, v)
    b, _, n, _ = q.shape
    count = k.shape[2] - n
    if prompts.dtype != torch.bool or count < 0 or tuple(prompts.shape) != (b, n, count):
        raise WorkbenchError(f"prompts is bool {[b, n, max(count, 0)]}; got {prompts.dtype} {list(prompts.shape)}")
    allowed = torch.ones(b, 1, n, k.shape[2], dtype=torch.bool, device=q.device)
    allowed[:, 0, :, 1 : 1 + count] = prompts
    return flash_attention(q, k, v, mask=Mask(dense=allowed), scale=scale)


def choose_prompts(
    x: Tensor, class_keys: Tensor, image_keys: Tensor, *, class_count: int, image_count: int, length: int = 1
) -> Tensor:
    """Prompts of every token of x ``[B, 1 + N, D]``, bool ``[B, 1 + N, P]``: the ``class_count`` prompts whose keys ``[P1, D]``
    are nearest to [CLS] in cosine, and for each image token the ``image_count`` nearest of ``image_keys`` ``[P2, D]``; a prompt
    is ``length`` tokens long, those of [CLS] come first."""
    pools = ((x[:, :1], class_keys, class_count), (x[:, 1:], image_keys, image_count))
    chosen = []
    for tokens, keys, count in pools:
        if not 0 <= count <= keys.shape[0]:
            raise WorkbenchError(f"counts are from 0 to the prompts of the pool, {keys.shape[0]}; got {count}")
        unit = torch.nn.functional.normalize(keys, dim=-1)
        near = (torch.nn.functional.normalize(tokens, dim=-1) @ unit.T).topk(count, -1).indices
        found = torch.zeros(*tokens.shape[:2], len(keys), dtype=torch.bool, device=x.device).scatter_(-1, near, True)
        chosen.append(found.repeat_interleave(length, -1))
    first, rest = chosen
    width = torch.nn.functional.pad
    return torch.cat([width(first, (0, rest.shape[2])), width(rest, (first.shape[2], 0))], 1)


def shuffled_segment_attention(
    q: Tensor, k: Tensor, v: Tensor, permutation: Tensor, *, segments: int, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """Two-dimensional shuffle mixer (RelaCtrl), its token part: permute, attend inside of contiguous segments, permute back.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; ``permutation`` int ``[N]`` or ``[H, N]``: the token at each
    place, one order for all heads or one per head. Source: #136 and its released code.
    """
    check_square(q, k, v)
    at_least_one("segments", segments)
    h, n = q.shape[1:3]
    order = permutation[None] if permutation.ndim == 1 else permutation
    fits = order.ndim == 2 and order.shape[0] in (1, h) and order.shape[1] == n and order.dtype == torch.int64
    if not fits or not torch.equal(order.sort(-1).values, torch.arange(n, device=order.device).expand_as(order)):
        raise WorkbenchError(
            f"permutation holds 0 .. {n - 1} in int64 [{n}] or [{h}, {n}]; got {list(permutation.shape)}"
        )
    size = -(-n // segments)
    groups = torch.nn.functional.pad(order, (0, -n % size), value=-1).unflatten(1, (-1, size))[None]
    return grouped_softmax(q, k, v, groups, groups, scale=scale)


def _instances(q: Tensor, k: Tensor, v: Tensor, instances: int) -> Tensor:
    check_square(q, k, v)
    at_least_one("instances", instances)
    if q.shape[2] % instances:
        raise WorkbenchError(f"instances divides the {q.shape[2]} tokens; got {instances}")
    return torch.arange(q.shape[2], device=q.device).view(1, 1, instances, -1)


def _pose_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    instances, types = nearest_grid(tokens)
    n = instances * types
    return {**example_tensors(seed, dtype, q=(2, 4, n, 8), k=(2, 2, n, 8), v=(2, 2, n, 8)), "instances": instances}


def _prompt_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens + 5, 8), "v": (2, 2, tokens + 5, 8)}
    x, *pools = example_tensors(seed + 1, dtype, x=(2, tokens, 6), class_keys=(2, 6), image_keys=(3, 6)).values()
    prompts = choose_prompts(x, *pools, class_count=1, image_count=2)
    return {**example_tensors(seed, dtype, **shapes), "prompts": prompts}


def _shuffle_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    drawn = example_tensors(seed, dtype, q=(2, 4, tokens, 8), k=(2, 2, tokens, 8), v=(2, 2, tokens, 8))
    return {**drawn, "permutation": _orders(4, tokens, seed), "segments": 3}


def _orders(heads: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, tokens, generator=generator).argsort(-1)


def _rows_are_instances(given: dict[str, Any]) -> dict[str, Any]:
    """Each row of the image plays an instance, its columns the types."""
    return {name: given[name] for name in ("q", "k", "v")} | {"instances": given["grid"][0]}


def _shuffled(given: dict[str, Any]) -> dict[str, Any]:
    order = _orders(given["q"].shape[1], given["q"].shape[2], 0).to(given["q"].device)
    return {name: given[name] for name in ("q", "k", "v")} | {"permutation": order, "segments": 4}


GROUP_POSE = "#151 Group Pose: A Simple Baseline for End-to-End Multi-person Pose Estimation (2023)"
VARIANTS = (
    Variant(
        name="group-pose-within-instance",
        paper=GROUP_POSE,
        family="softmax",
        priority="C",
        operator=within_instance_attention,
        example=_pose_example,
        reference="Michel-liu/GroupPose models/grouppose",
        recipe=Recipe(prepare=_rows_are_instances),
    ),
    Variant(
        name="group-pose-across-instances",
        paper=GROUP_POSE,
        family="softmax",
        priority="C",
        operator=across_instance_attention,
        example=_pose_example,
        reference="Michel-liu/GroupPose models/grouppose",
        recipe=Recipe(prepare=_rows_are_instances),
    ),
    Variant(
        name="tcpa-prompt-attention",
        paper="#9 Token Coordinated Prompt Attention is Needed for Visual Prompting (2025)",
        family="softmax",
        priority="C",
        operator=prompt_attention,
        example=_prompt_example,
        reference="zhoujiahuan1991/ICML2025-TCPA models/TCPA.py",
        note="Prompts are keys and values only, no queries.",
    ),
    Variant(
        name="relactrl-tdsm-token-mixer",
        paper="#136 RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers (2025)",
        family="softmax",
        priority="C",
        operator=shuffled_segment_attention,
        example=_shuffle_example,
        reference="360CVGroup/RelaCtrl pixart_relactrl_v1.py",
        note="The released code shuffles all numbers of a group of channels, tokens and channels alike, before it projects "
        "queries, keys and values; this operator shuffles tokens, per head, after that.",
        recipe=Recipe(prepare=_shuffled),
    ),
)
