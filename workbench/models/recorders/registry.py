"""Which recorder knows which module class: one line each. Subclasses of a listed class are recorded in the same way."""

from __future__ import annotations

from torch import nn

from workbench.models.recorders.base import Recorder
from workbench.models.recorders.blocks import BigBird
from workbench.models.recorders.conv import ShortConv
from workbench.models.recorders.delta import GatedDelta, KimiDelta
from workbench.models.recorders.differential import Differential
from workbench.models.recorders.fourier import Fourier
from workbench.models.recorders.hashing import HashedChunks, LocalChunks
from workbench.models.recorders.landmarks import Nystroem
from workbench.models.recorders.linear import Lightning, RgLru, Rwkv
from workbench.models.recorders.longformer import Longformer
from workbench.models.recorders.scan import Mamba, Mamba2
from workbench.models.recorders.softmax import Bloom, Falcon, Mpt
from workbench.models.recorders.windows import ShiftedWindows

RECORDERS: dict[str, type[Recorder]] = {
    "FalconAttention": Falcon,
    "BloomAttention": Bloom,
    "MptAttention": Mpt,
    "Qwen3NextGatedDeltaNet": GatedDelta,
    "Qwen3_5GatedDeltaNet": GatedDelta,
    "Qwen3_5MoeGatedDeltaNet": GatedDelta,
    "OlmoHybridGatedDeltaNet": GatedDelta,
    "KimiLinearDeltaAttention": KimiDelta,
    "MiniMaxLightningAttention": Lightning,
    "MambaMixer": Mamba,
    "FalconMambaMixer": Mamba,
    "JambaMambaMixer": Mamba,
    "Mamba2Mixer": Mamba2,
    "BambaMixer": Mamba2,
    "GraniteMoeHybridMambaLayer": Mamba2,
    "NemotronHMamba2Mixer": Mamba2,
    "RecurrentGemmaRglru": RgLru,
    "RwkvSelfAttention": Rwkv,
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "DiffLlamaAttention": Differential,
    "LongformerSelfAttention": Longformer,
    "BigBirdAttention": BigBird,
    "LocalSelfAttention": LocalChunks,
    "LSHSelfAttention": HashedChunks,
    "NystromformerSelfAttention": Nystroem,
    "FNetBasicFourierTransform": Fourier,
    "Swinv2SelfAttention": ShiftedWindows,
    "DonutSwinSelfAttention": ShiftedWindows,
    "MaskFormerSwinSelfAttention": ShiftedWindows,
    "Swin2SRSelfAttention": ShiftedWindows,
}


def is_listed(module: nn.Module) -> bool:
    return any(cls.__name__ in RECORDERS for cls in type(module).__mro__)


def is_recorded(module: nn.Module) -> bool:
    """Whether a module's class is listed, and mixes as its recorder knows it."""
    return is_listed(module) and recorder_of(module).fits(module)


def recorder_of(module: nn.Module) -> type[Recorder]:
    """The recorder of a module that ``is_listed``."""
    return RECORDERS[next(cls.__name__ for cls in type(module).__mro__ if cls.__name__ in RECORDERS)]
