"""Bridges for tests, and everything that a run could leave behind in one."""

import builders as B
import torch
from transformer_lens.model_bridge import TransformerBridge

import workbench as wb
from workbench.models.bridge import BridgeModel
from workbench.models.interface import configs

IDS = B.ids()


def boot(name: str) -> BridgeModel:
    """A fresh bridge: tests that change one must not share it."""
    net = B.NETS[name](dtype=torch.float32)
    net.config.architectures = [type(net).__name__]
    return wb.load(TransformerBridge.boot_transformers(name, hf_model=net, tokenizer=B.tokenizer()))


def state(bridge) -> tuple:
    """Everything that a run could leave behind."""
    hooks = {n: (len(p.fwd_hooks), len(p.bwd_hooks), len(p._forward_hooks)) for n, p in bridge.hook_dict.items()}
    modules = [(n, id(m)) for n, m in bridge.original_model.named_modules()]
    flags = {
        f: getattr(bridge.cfg, f) for f in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in")
    }
    attention = [config._attn_implementation_internal for config in configs(bridge.original_model)]
    return hooks, modules, flags, attention, bridge.training
