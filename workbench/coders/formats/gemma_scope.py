"""Gemma Scope (arXiv 2408.05147): ``params.npz`` with W_enc, b_enc, W_dec, b_dec and a threshold per feature.

Its second edition has ``params.safetensors`` with small letters and, in skip transcoders, ``affine_skip_connection``. All are
JumpReLU coders that do not take b_dec off their input. Which site they belong to stands in the path of their repository and not
in the file; ``about`` has no site.
"""

from __future__ import annotations

from pathlib import Path

from workbench.coders.coder import Coder
from workbench.coders.folder import told
from workbench.coders.kinds.threshold import Threshold
from workbench.coders.tensor_files import check_tensors, filled, read_json, read_npz, read_safetensors

_SECOND = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}


def read_gemma_scope(path: Path) -> Coder:
    """The coder in ``params.npz`` or ``params.safetensors``, or in the folder of one."""
    folder = path if path.is_dir() else path.parent
    where = path if path.is_file() else next(iter(sorted(folder.glob("params.*"))), folder / "params.npz")
    second = where.suffix == ".safetensors"
    tensors = read_safetensors(where) if second else read_npz(where)
    state = {_SECOND.get(name, name) if second else name: value for name, value in tensors.items()}
    form: dict[str, tuple[str | int, ...]] = {
        "W_enc": ("D", "F"), "b_enc": ("F",), "W_dec": ("F", "O"), "b_dec": ("O",), "threshold": ("F",), "W_skip": ("D", "O"),
    }  # fmt: skip
    check_tensors(state, form, where, optional=("W_skip",))
    state["theta"] = state.pop("threshold")
    coder = filled(Threshold, state, centred=False)
    config = read_json(folder / "config.json") if second and (folder / "config.json").is_file() else {}
    return told(
        coder, "gemma_scope_2" if second else "gemma_scope", model=config.get("model_name"), config=config or None
    )
