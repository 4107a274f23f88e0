"""Do coders open in SAELens, and its coders here? Numbers and facts both ways, with SAELens in an environment of its own.

    python tests/benchmarks/sae_formats.py --peers /path/to/python/with/sae-lens [--rows 64] [--json]

``ours`` are coders of every kind, written here, opened there, and once more from what SAELens saves of them. ``theirs`` are
coders of every architecture that SAELens registers, with its normalisations and dtypes, saved there, opened here, and written
back: SAELens must then have the same settings and the same weights bit by bit. Columns: the largest difference of features and
of outputs, and whether the facts are the same. Architectures that only we have must be refused there. Exit code 1 if anything
fails.

An environment: ``python -m venv peers && peers/bin/pip install sae-lens``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTH, FEATURES = 16, 32
TOLERANCE = {"float32": 2e-5, "float64": 1e-10, "bfloat16": 0.1}
OWN = "workbench-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python that has sae-lens")
    parser.add_argument("--rows", type=int, default=64, help="rows to encode")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--role", choices=("make", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        sys.path.pop(0)  # the benchmarks beside this file have names that packages there look for
        there(args.role, args.folder)
        return 0
    if not args.peers:
        parser.error("--peers names a Python that has sae-lens; see the end of --help")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_ours(folder, args.rows)
        made = ask(args.peers, "make", folder)
        rows = [*check_ours(folder, made), *check_theirs(folder, ask(args.peers, "check", folder, write_back))]
    failed = [row for row in rows if not row["ok"]]
    if args.json:
        print(json.dumps({"sae_lens": made["version"], "rows": rows, "failed": len(failed)}, indent=1))
    else:
        show(rows, made["version"])
    return 1 if failed else 0


def ask(python: str, role: str, folder: Path, before: Any = None) -> dict[str, Any]:
    """Run this script there."""
    if before is not None:
        before(folder)
    command = [python, str(Path(__file__).resolve()), "--role", role, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads((folder / f"{role}.json").read_text())
    return answer


# ------------------------------------------------------------ here


def write_ours(folder: Path, rows: int) -> None:
    """Coders of all kinds, and what they make of random rows."""
    import torch
    from safetensors.torch import save_file

    from workbench.coders.catalogue import coder_kinds, make_coder

    shapes: dict[str, dict[str, Any]] = {
        "": {}, "uncentred": {"centred": False}, "transcoder": {"d_out": 12}, "skip transcoder": {"d_out": 12, "skip": True},
        "square transcoder": {"d_out": WIDTH, "centred": False}, "crosscoder": {"reads": (10, 6), "writes": (10, 6)},
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator)
    for kind, cls in coder_kinds().items():
        for shape, sizes in shapes.items():
            coder = make_coder(kind, WIDTH, FEATURES, **sizes, **({"k": 4} if "k" in cls.defaults else {}))
            with torch.no_grad():
                for name, value in (*coder.named_parameters(), *coder.named_buffers()):
                    value.add_(0.1 * torch.randn(value.shape, generator=generator).abs_() if "threshold" in name
                               else 0.1 * torch.randn(value.shape, generator=generator))  # fmt: skip
            across = "transcoder" in shape
            coder.about = {"model": "gpt2", "reads": ["blocks.1.ln2.hook_normalized" if across else "blocks.1.hook_resid_pre"],
                           "context": 128, "prepend_bos": True}  # fmt: skip
            if across:
                coder.about["writes"] = ["blocks.1.hook_mlp_out"]
            place = folder / "ours" / f"{kind} {shape}".strip().replace(" ", "_")
            place.parent.mkdir(exist_ok=True)
            coder.save(place)
            with torch.no_grad():
                save_file({"x": x, "f": coder.encode(x), "y": coder(x)}, place / "numbers.safetensors")


def check_ours(folder: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    """What SAELens made of ours, and ours again from what it saved."""
    import torch

    import workbench as wb

    rows = []
    for place in sorted((folder / "ours").iterdir()):
        found = made["ours"][place.name]
        row = {"coder": f"ours: {place.name.replace('_', ' ')}", **found}
        if found["architecture"].startswith(OWN):
            row["ok"] = found["error"] is not None
            row["facts"] = "refused there" if row["ok"] else "opened there"
        elif found["error"] is None:
            first, again = wb.load_coder(place), wb.load_coder(folder / "again" / place.name)
            same = first.kind == again.kind and first.options == again.options
            about = {name: value for name, value in again.about.items() if name != "saelens"} == first.about
            states = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
            weights = all(torch.allclose(a, b, rtol=1e-6) for a, b in states)
            row["facts"] = "same" if same and about and weights else "differ"
            row["ok"] = row["facts"] == "same" and close(found, "float32")
        else:
            row["ok"], row["facts"] = False, found["error"]
        rows.append(row)
    return rows


def write_back(folder: Path) -> None:
    """Read SAELens's coders, note what they make of its rows, and write them."""
    import torch
    from safetensors.torch import load_file

    import workbench as wb

    found: dict[str, Any] = {}
    for place in sorted((folder / "theirs").iterdir()):
        numbers = load_file(place / "numbers.safetensors")
        x, f, y = (
            numbers[name].flatten(-2) if "hook_z" in place.name and name != "f" else numbers[name] for name in "xfy"
        )
        try:
            coder = wb.load_coder(place)
            with torch.no_grad():
                x = x.to(coder.W_dec.dtype)
                found[place.name] = {
                    "f": apart(coder.encode(x), f),
                    "y": apart(coder(x), y),
                    "error": None,
                    "kind": coder.kind,
                }
            wb.save_coder(coder, folder / "back" / place.name)
        except Exception as error:
            found[place.name] = {"error": f"{type(error).__name__}: {error}"}
    (folder / "here.json").write_text(json.dumps(found))


def check_theirs(folder: Path, checked: dict[str, Any]) -> list[dict[str, Any]]:
    here = json.loads((folder / "here.json").read_text())
    rows = []
    for name, found in here.items():
        there = checked.get(name, {"error": "was not written back"})
        row = {"coder": f"theirs: {name.replace('_', ' ')}", "architecture": "", **there, **found}
        row["facts"] = found["error"] or there["error"] or ("same" if there["same"] else "differ")
        row["ok"] = row["facts"] == "same" and close(found, there["dtype"])
        rows.append(row)
    return rows


def apart(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).abs().max())


def close(found: dict[str, Any], dtype: str) -> bool:
    return max(found["f"], found["y"]) <= TOLERANCE[dtype]


def show(rows: list[dict[str, Any]], version: str) -> None:
    print(f"SAELens {version}; largest differences on random rows\n")
    print(f"{'coder':44} {'architecture':26} {'features':>9} {'outputs':>9}  facts")
    for row in rows:
        numbers = "".join(f" {row[name]:9.1e}" if isinstance(row.get(name), float) else f" {'':9}" for name in "fy")
        print(f"{row['coder']:44} {row['architecture']:26}{numbers}  {row['facts']}{'' if row['ok'] else '   FAILED'}")
    failed = sum(not row["ok"] for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} agree")


# ------------------------------------------------------------ there, with SAELens alone


def there(role: str, folder: Path) -> None:
    import sae_lens
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    if role == "make":
        found: dict[str, Any] = {"version": sae_lens.__version__, "ours": {}}
        for place in sorted((folder / "ours").iterdir()):
            numbers = load_file(place / "numbers.safetensors")
            cfg = json.loads((place / "cfg.json").read_text())
            answer: dict[str, Any] = {"architecture": cfg["architecture"], "error": None}
            try:
                sae = sae_lens.SAE.load_from_disk(place)
                with torch.no_grad():
                    answer |= {
                        "f": apart(sae.encode(numbers["x"]), numbers["f"]),
                        "y": apart(sae(numbers["x"]), numbers["y"]),
                    }
                sae.save_model(folder / "again" / place.name)
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"
            found["ours"][place.name] = answer
        for name, sae in examples().items():
            place = folder / "theirs" / name
            sae.save_model(place)
            shape = (2, 9, 2, WIDTH // 2) if "hook_z" in name else (2, 9, WIDTH)
            x = torch.randn(shape).to(sae.dtype)
            with torch.no_grad():
                numbers = {"x": x, "f": sae.encode(x), "y": sae(x)}
            save_file({key: value.contiguous() for key, value in numbers.items()}, place / "numbers.safetensors")
    else:
        found = {}
        for place in sorted((folder / "back").iterdir()):
            first, second = (sae_lens.SAE.load_from_disk(folder / kind / place.name) for kind in ("theirs", "back"))
            facts = [sae.cfg.to_dict() for sae in (first, second)]
            facts[1]["metadata"].pop("workbench", None)
            weights = [sae.state_dict() for sae in (first, second)]
            same = facts[0] == facts[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
            found[place.name] = {
                "architecture": facts[0]["architecture"],
                "dtype": facts[0]["dtype"],
                "same": same,
                "error": None,
            }
    (folder / f"{role}.json").write_text(json.dumps(found))


def examples() -> dict[str, Any]:
    """A random coder of every registered architecture, and variants of how it reads."""
    from dataclasses import fields

    import torch
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

    special = {
        "topk": {"k": 4}, "abstopk": {"k": 4}, "temporal": {"n_heads": 2, "bottleneck_factor": 4, "kval_topk": 4},
        "matching_pursuit": {"max_iterations": 5},
    }  # fmt: skip
    variants: dict[str, dict[str, Any]] = {
        "": {}, "uncentred": {"apply_b_dec_to_input": False}, "layer_norm": {"normalize_activations": "layer_norm"},
        "constant_norm": {"normalize_activations": "constant_norm_rescale"}, "hook_z": {"reshape_activations": "hook_z"},
        "bfloat16": {"dtype": "bfloat16"}, "float64": {"dtype": "float64"},
    }  # fmt: skip
    found = {}
    for architecture, (cls, config) in SAE_CLASS_REGISTRY.items():
        across = any(field.name == "d_out" for field in fields(config))
        own = dict(variants)
        if architecture in ("topk", "abstopk"):
            own["rescaled"] = {"rescale_acts_by_decoder_norm": True}
        if architecture == "temporal":
            scaled = {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.5}
            own |= {"untied": {"tied_weights": False}, "relu": {"sae_diff_type": "relu"}, "scaled": scaled}
            own = {name: more for name, more in own.items() if name != "hook_z"}
        if across:
            own = {name: more for name, more in own.items() if name not in ("uncentred", "hook_z")}
        for name, more in own.items():
            hook = {"hook_name": "blocks.1.attn.hook_z" if name == "hook_z" else "blocks.1.hook_resid_pre"}
            metadata = SAEMetadata(model_name="gpt2", **hook, context_size=128, prepend_bos=True, note={"a": [1, None]})
            sizes = {
                "d_in": WIDTH,
                "d_sae": FEATURES,
                **({"d_out": 12, "apply_b_dec_to_input": False} if across else {}),
            }
            sae = cls(config(**{**sizes, **special.get(architecture, {}), **more}, metadata=metadata))
            with torch.no_grad():
                for key, value in sae.named_parameters():
                    value.copy_(0.3 * torch.randn(value.shape))
                    if "threshold" in key:
                        value.abs_()
                if architecture == "matching_pursuit":
                    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
            found[f"{architecture}_{name}".strip("_")] = sae
    return found


if __name__ == "__main__":
    sys.exit(main())
