"""How the files beside this script were made: by the tools' own ``save`` functions, from small random weights.

Run with a Python that has sae-lens 6.54, dictionary-learning 0.1, eai-sparsify 1.3 and circuit-tracer 0.5 (without its
dependencies), in this folder. ``expected.safetensors`` of each tool holds, for every case, inputs x and what the tool makes of
them: features f and outputs y.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, F = 6, 8


def randomised(module: torch.nn.Module, seed: int) -> None:
    """Random numbers in every parameter, thresholds above 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
            if "threshold" in name:
                value.abs_()


def inputs(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def saelens() -> None:
    import sae_lens as sl

    folder, expected = fresh("saelens"), {}
    facts = {
        "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_pre", "hook_head_index": None, "prepend_bos": True,
        "context_size": 64, "dataset_path": "tiny/text", "sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12",
    }  # fmt: skip

    def metadata(**more: object) -> sl.saes.sae.SAEMetadata:
        return sl.saes.sae.SAEMetadata(**{**facts, **more})

    plain = {"d_in": D, "d_sae": F}
    across = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    cases = {
        "standard": (sl.StandardSAE, sl.StandardSAEConfig(**plain, metadata=metadata())),
        "standard-uncentred": (sl.StandardSAE, sl.StandardSAEConfig(**plain, apply_b_dec_to_input=False, metadata=metadata())),
        "standard-bfloat16": (sl.StandardSAE, sl.StandardSAEConfig(**plain, dtype="bfloat16", metadata=metadata())),
        "standard-hook-z": (
            sl.StandardSAE,
            sl.StandardSAEConfig(
                **plain, reshape_activations="hook_z", metadata=metadata(hook_name="blocks.1.attn.hook_z")
            ),
        ),
        "standard-layer-norm": (
            sl.StandardSAE, sl.StandardSAEConfig(**plain, normalize_activations="layer_norm", metadata=metadata())
        ),
        "topk-constant-norm": (
            sl.TopKSAE, sl.TopKSAEConfig(**plain, k=3, normalize_activations="constant_norm_rescale", metadata=metadata())
        ),
        "gated": (sl.GatedSAE, sl.GatedSAEConfig(**plain, metadata=metadata())),
        "topk": (sl.TopKSAE, sl.TopKSAEConfig(**plain, k=3, metadata=metadata())),
        "topk-rescaled": (sl.TopKSAE, sl.TopKSAEConfig(**plain, k=3, rescale_acts_by_decoder_norm=True, metadata=metadata())),
        "abstopk": (sl.AbsTopKSAE, sl.AbsTopKSAEConfig(**plain, k=3, metadata=metadata())),
        "jumprelu": (sl.JumpReLUSAE, sl.JumpReLUSAEConfig(**plain, metadata=metadata())),
        "matching_pursuit": (
            sl.MatchingPursuitSAE, sl.MatchingPursuitSAEConfig(**plain, max_iterations=4, metadata=metadata())
        ),
        "temporal": (
            sl.TemporalSAE,
            sl.TemporalSAEConfig(**plain, n_heads=2, bottleneck_factor=2, kval_topk=3, metadata=metadata()),
        ),
        "transcoder": (
            sl.Transcoder, sl.TranscoderConfig(**plain, d_out=5, apply_b_dec_to_input=False, metadata=metadata(**across))
        ),
        "skip_transcoder": (
            sl.SkipTranscoder, sl.SkipTranscoderConfig(**plain, d_out=5, apply_b_dec_to_input=False, metadata=metadata(**across))
        ),
        "jumprelu_transcoder": (
            sl.JumpReLUTranscoder,
            sl.JumpReLUTranscoderConfig(**plain, d_out=5, apply_b_dec_to_input=False, metadata=metadata(**across)),
        ),
        "jumprelu_skip_transcoder": (
            sl.JumpReLUSkipTranscoder,
            sl.JumpReLUSkipTranscoderConfig(**plain, d_out=5, apply_b_dec_to_input=False, metadata=metadata(**across)),
        ),
    }  # fmt: skip
    for seed, (name, (kind, cfg)) in enumerate(cases.items()):
        sae = kind(cfg)
        randomised(sae, seed)
        if name == "matching_pursuit":
            sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
        x = inputs(100 + seed, 2, 4, 2, 3) if "hook-z" in name else inputs(100 + seed, 2, 4, D)
        with torch.no_grad():
            f, y = sae.encode(x), sae(x)
        sae.save_model(folder / name)
        expected |= {f"{name}.x": x, f"{name}.f": f, f"{name}.y": y}

    save_file({"sparsity": torch.linspace(-6, 0, F)}, folder / "standard" / "sparsity.safetensors")
    (folder / "standard-scaled").mkdir()
    shutil.copy(folder / "standard" / "sae_weights.safetensors", folder / "standard-scaled")
    cfg = json.loads((folder / "standard" / "cfg.json").read_text())
    (folder / "standard-scaled" / "cfg.json").write_text(
        json.dumps(cfg | {"normalize_activations": "expected_average_only_in"})
    )
    scaler = sl.training.activation_scaler.ActivationScaler(scaling_factor=0.25)
    scaler.save(str(folder / "standard-scaled" / "activation_scaler.json"))
    scaled = sl.SAE.load_from_disk(folder / "standard-scaled")
    x = inputs(90, 2, 4, D)
    scaled.fold_activation_norm_scaling_factor(0.25)
    with torch.no_grad():
        expected |= {"standard-scaled.x": x, "standard-scaled.f": scaled.encode(x), "standard-scaled.y": scaled(x)}

    trained = {
        "batchtopk": (sl.BatchTopKTrainingSAE, sl.BatchTopKTrainingSAEConfig(**plain, k=3, metadata=metadata())),
        "matryoshka_batchtopk": (
            sl.MatryoshkaBatchTopKTrainingSAE,
            sl.MatryoshkaBatchTopKTrainingSAEConfig(**plain, k=3, matryoshka_widths=[4, F], metadata=metadata()),
        ),
    }
    for seed, (name, (kind, cfg)) in enumerate(trained.items()):
        sae = kind(cfg)
        randomised(sae, 50 + seed)
        sae.topk_threshold.fill_(0.3)
        sae.save_model(folder / f"{name}-checkpoint")
        sae.save_inference_model(folder / f"{name}-inference")
        read, x = sl.SAE.load_from_disk(folder / f"{name}-inference"), inputs(150 + seed, 2, 4, D)
        with torch.no_grad():
            numbers = {"x": x, "f": read.encode(x), "y": read(x)}
        for saved in ("checkpoint", "inference"):
            expected |= {f"{name}-{saved}.{key}": value.clone() for key, value in numbers.items()}
    finish(folder, expected)


def dictionary_learning() -> None:
    from dictionary_learning import dictionary as dl
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    folder, expected = fresh("dictionary_learning"), {}
    cases = {
        "AutoEncoder": (dl.AutoEncoder(D, F), {}),
        "AutoEncoderNew": (dl.AutoEncoderNew(D, F), {}),
        "GatedAutoEncoder": (dl.GatedAutoEncoder(D, F), {}),
        "AutoEncoderTopK": (AutoEncoderTopK(D, F, 3), {"k": 3}),
        "BatchTopKSAE": (BatchTopKSAE(D, F, 3), {"k": 3}),
        "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE(D, F, 3, [2, 6]), {"k": 3, "group_sizes": [2, 6]}),
        "JumpReluAutoEncoder": (dl.JumpReluAutoEncoder(D, F), {}),
    }
    for seed, (name, (coder, more)) in enumerate(cases.items()):
        randomised(coder, seed)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            coder.threshold.fill_(0.3)
        x = inputs(200 + seed, 8, D)
        with torch.no_grad():
            f = coder.encode(x)
            expected |= {f"{name}.x": x, f"{name}.f": f, f"{name}.y": coder.decode(f)}
        (folder / name).mkdir()
        torch.save(coder.state_dict(), folder / name / "ae.pt")
        trainer = {
            "dict_class": name, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": "resid_post_layer_1", **more,
        }  # fmt: skip
        config = {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 64}}
        (folder / name / "config.json").write_text(json.dumps(config, indent=4))
    finish(folder, expected)


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    folder, expected = fresh("sparsify"), {}
    cases = {
        "layers.1": SparseCoderConfig(num_latents=F, k=3),
        "layers.2": SparseCoderConfig(num_latents=F, k=4, activation="groupmax"),
        "layers.1.mlp": SparseCoderConfig(num_latents=F, k=3, transcode=True, skip_connection=True),
    }
    for seed, (name, cfg) in enumerate(cases.items()):
        coder = SparseCoder(D, cfg)
        randomised(coder, seed)
        x = inputs(300 + seed, 8, D)
        with torch.no_grad():
            found = coder(x)
        f = torch.zeros(8, F).scatter(1, found.latent_indices, found.latent_acts)
        coder.save_to_disk(folder / name)
        expected |= {f"{name}.x": x, f"{name}.f": f, f"{name}.y": found.sae_out.detach()}
    finish(folder, expected)


def circuit_tracer() -> None:
    found = importlib.util.find_spec("circuit_tracer")
    root = found.submodule_search_locations[0]
    for name in ("", ".transcoder", ".utils", ".frontend"):  # their __init__ files import every dependency
        package = types.ModuleType(f"circuit_tracer{name}")
        package.__path__ = [root + name.replace(".", "/")]
        sys.modules[f"circuit_tracer{name}"] = package
    sys.modules["circuit_tracer.utils"].get_default_device = lambda: torch.device("cpu")
    from circuit_tracer.frontend.graph_models import Metadata, Model, Node, QParams
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from circuit_tracer.transcoder.single_layer_transcoder import (
        SingleLayerTranscoder,
        TranscoderSet,
        load_gemma_scope_transcoder,
    )

    folder, expected = fresh("circuit_tracer"), {}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    kinds = {"plt-relu": (torch.nn.functional.relu, True), "plt-jumprelu": (None, False)}
    for seed, (name, (activation, skip)) in enumerate(kinds.items()):
        parts = {}
        for layer in range(2):
            chosen = activation if activation is not None else JumpReLU(torch.full((F,), 0.2), 0.1)
            parts[layer] = SingleLayerTranscoder(D, F, chosen, layer, skip_connection=skip, dtype=torch.float32)
            randomised(parts[layer], 10 * seed + layer)
        TranscoderSet(parts, **hooks).to_safetensors(str(folder / name))
        (folder / name / "config.yaml").write_text(
            "model_kind: transcoder_set\nmodel_name: google/gemma-2-2b\n"
            "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
        )
        for layer, part in parts.items():
            x = inputs(400 + 10 * seed + layer, 8, D)
            with torch.no_grad():
                f = part.encode(x)
                expected |= {f"{name}.{layer}.x": x, f"{name}.{layer}.f": f, f"{name}.{layer}.y": part.decode(f, x)}
    for seed, (name, kind) in enumerate({"clt-relu": "relu", "clt-jumprelu": "jump_relu"}.items()):
        clt = CrossLayerTranscoder(2, F, D, kind, lazy_decoder=False, dtype=torch.float32)
        randomised(clt, 30 + seed)
        clt.to_safetensors(str(folder / name))
        (folder / name / "config.yaml").write_text(
            "model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b\n"
            "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
        )
        x = inputs(430 + seed, 2, 8, D)
        with torch.no_grad():
            f = clt.encode(x)
            expected |= {f"{name}.x": x, f"{name}.f": f, f"{name}.y": clt.decode(f.to_sparse())}

    scope = folder / "gemma-scope"
    scope.mkdir()
    generator = torch.Generator().manual_seed(40)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    arrays = {name: 0.5 * torch.randn(*shape, generator=generator).numpy() for name, shape in shapes.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    np.savez(scope / "params.npz", **arrays)
    part, x = load_gemma_scope_transcoder(str(scope / "params.npz"), 0), inputs(440, 8, D)
    with torch.no_grad():
        f = part.encode(x)
        expected |= {"gemma-scope.x": x, "gemma-scope.f": f, "gemma-scope.y": part.decode(f)}

    nodes = [
        Node.token_node(0, 11, 0.9), Node.token_node(1, 12, 0.8), Node.feature_node(0, 1, 5, 0.3, 1.5),
        Node.feature_node(1, 1, 7, 0.5, 2.25), Node.error_node(0, 1, 0.95),
        Node.logit_node(1, 42, " cat", 2, True, 0.75), Node.logit_node(1, 43, " dog", 2, False, 0.125),
    ]  # fmt: skip
    ends = [(0, 2, 0.5), (1, 2, 1.25), (2, 3, -0.75), (4, 3, 0.125), (3, 5, 2.0), (2, 6, -1.5)]
    links = [{"source": nodes[s].node_id, "target": nodes[t].node_id, "weight": w} for s, t, w in ends]
    record = Model(
        metadata=Metadata(slug="tiny", scan="gemma-2-2b", transcoder_list=[], prompt="a b",
                          prompt_tokens=["a", " b"], node_threshold=0.8),
        qParams=QParams(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos=""),
        nodes=nodes,
        links=links,
    )  # fmt: skip
    (folder / "graph.json").write_text(record.model_dump_json(indent=2))
    finish(folder, expected)


def finish(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    save_file({name: value.detach().contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    large = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 20_000]
    print(folder.name, sum(path.stat().st_size for path in folder.rglob("*")), "bytes", large or "")


if __name__ == "__main__":
    for tool in sys.argv[1:] or ("saelens", "dictionary_learning", "sparsify", "circuit_tracer"):
        globals()[tool]()
