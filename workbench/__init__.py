"""The attention workbench: see and explain what attention does inside neural networks.

This module is a facade of lazy names: nothing heavy is imported until a name is used, so
``import workbench`` stays cheap. ``dir(workbench)`` lists every public name.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES: dict[str, str] = {
    # models and runs
    "load": "workbench.models.load:load",
    "bundled": "workbench.models.load:bundled",
    "Model": "workbench.models.protocol:Model",
    "Shape": "workbench.models.protocol:Shape",
    "Tokens": "workbench.models.protocol:Tokens",
    "Manifest": "workbench.models.protocol:Manifest",
    "NativeModel": "workbench.models.native:NativeModel",
    "Site": "workbench.sites:Site",
    "Run": "workbench.run:Run",
    "Provenance": "workbench.run:Provenance",
    "generate": "workbench.models.generation:generate",
    "Generation": "workbench.run:Generation",
    "open_maps": "workbench.stored:open_maps",
    "Capture": "workbench.captures:Capture",
    "capture": "workbench.captures:capture",
    # maps and mods
    "AttentionMap": "workbench.maps:AttentionMap",
    "Mask": "workbench.kernels.mask:Mask",
    "Mod": "workbench.mods:Mod",
    "variants": "workbench.catalogue:variants",
    "Variant": "workbench.catalogue:Variant",
    # attention of other libraries
    "from_flex": "workbench.adapters.flex:from_flex",
    "to_mask_mod": "workbench.adapters.flex_masks:to_mask_mod",
    "mask_from_mod": "workbench.adapters.flex_masks:mask_from_mod",
    "capture_sdpa": "workbench.adapters.sdpa:capture_sdpa",
    "timm_map": "workbench.adapters.timm:timm_map",
    "capture_timm": "workbench.adapters.timm:capture_timm",
    "fla_map": "workbench.adapters.fla:fla_map",
    "fla_calls": "workbench.adapters.fla:fla_calls",
    "from_fla": "workbench.adapters.fla:from_fla",
    "from_natten": "workbench.adapters.natten:from_natten",
    # tasks and circuits
    "Task": "workbench.pairs:Task",
    "Pairs": "workbench.pairs:Pairs",
    "task": "workbench.datasets.catalogue:task",
    "tasks": "workbench.datasets.catalogue:tasks",
    "Circuit": "workbench.circuits:Circuit",
    "circuit_graph": "workbench.circuits:circuit_graph",
    # analyses: all of them, and the instruments they share
    "analyses": "workbench.probes.catalogue:analyses",
    "Analysis": "workbench.probes.catalogue:Analysis",
    "ablation_curve": "workbench.probes.ablation:ablation_curve",
    "map_error": "workbench.probes.map_errors:map_error",
    "held_key_errors": "workbench.probes.map_errors:held_key_errors",
    # analyses: sinks
    "sinks": "workbench.probes.sinks.scores:sinks",
    "sink_levels": "workbench.probes.sinks.levels:sink_levels",
    "SinkLevels": "workbench.probes.sinks.levels:SinkLevels",
    "sink_alignment": "workbench.probes.sinks.alignment:sink_alignment",
    "sink_formation": "workbench.probes.sinks.formation:sink_formation",
    "sink_removal": "workbench.probes.sinks.removal:sink_removal",
    "massive_activations": "workbench.probes.sinks.massive:massive_activations",
    "massive_effect": "workbench.probes.sinks.massive_effect:massive_effect",
    "compare_sinks": "workbench.probes.sinks.compare:compare_sinks",
    "received": "workbench.probes.sinks.received:received",
    "gates": "workbench.probes.sinks.gates:gates",
    "learned_sinks": "workbench.probes.sinks.gates:learned_sinks",
    "sink_use": "workbench.probes.sinks.use:sink_use",
    "overfocus": "workbench.probes.sinks.overfocus:overfocus",
    "overfocus_loss": "workbench.probes.sinks.overfocus:overfocus_loss",
    "value_drain": "workbench.probes.sinks.drain:value_drain",
    "inactive_heads": "workbench.probes.sinks.inactive:inactive_heads",
    "zeroable": "workbench.probes.sinks.inactive:zeroable",
    "tagging": "workbench.probes.sinks.tagging:tagging",
    "untag": "workbench.probes.sinks.tagging:untag",
    "eviction": "workbench.probes.sinks.eviction:eviction",
    # analyses: retrieval
    "retrieval_heads": "workbench.probes.retrieval.copying:retrieval_heads",
    "masking": "workbench.probes.retrieval.masking:masking",
    "masking_curve": "workbench.probes.retrieval.masking:masking_curve",
    "needle_choice": "workbench.probes.retrieval.choosing:needle_choice",
    "haystack_prompts": "workbench.probes.retrieval.haystack:haystack_prompts",
    "locate_needle": "workbench.probes.retrieval.haystack:locate_needle",
    "retrieval_activation": "workbench.probes.retrieval.dynamics:activation",
    "load_scores": "workbench.probes.retrieval.score_files:load_scores",
    "induction_or_retrieval": "workbench.probes.retrieval.discriminate:induction_or_retrieval",
    "contributions": "workbench.probes.retrieval.contributions:contributions",
    "recovery": "workbench.probes.retrieval.recovery:recovery",
    "Documents": "workbench.probes.retrieval.documents:Documents",
    "needle_documents": "workbench.probes.retrieval.documents:needle_documents",
    "query_heads": "workbench.probes.retrieval.query_heads:query_heads",
    "head_kv": "workbench.probes.retrieval.headkv:head_kv",
    "cache_budget": "workbench.probes.retrieval.headkv:cache_budget",
    "block_rank": "workbench.probes.retrieval.block_rank:block_rank",
    "block_relevance": "workbench.probes.retrieval.block_rank:block_relevance",
    "Streaming": "workbench.probes.retrieval.streaming:Streaming",
    "streaming_effect": "workbench.probes.retrieval.streaming:streaming_effect",
    "razor_scores": "workbench.probes.retrieval.razor:razor_scores",
    "razor_heads": "workbench.probes.retrieval.razor:razor_heads",
    "razor_recall": "workbench.probes.retrieval.razor:razor_recall",
    "duo_gates": "workbench.probes.retrieval.duo:duo_gates",
    # analyses: rhythm
    "waad": "workbench.probes.rhythm.waad:waad",
    "fai": "workbench.probes.rhythm.waad:fai",
    "head_spans": "workbench.probes.rhythm.spans:head_spans",
    "local_heads": "workbench.probes.rhythm.spans:local_heads",
    "global_heads": "workbench.probes.rhythm.spans:global_heads",
    "rhythm": "workbench.probes.rhythm.rhythm:rhythm",
    "couplings": "workbench.probes.rhythm.rhythm:couplings",
    "receiver_heads": "workbench.probes.rhythm.receivers:receiver_heads",
    "perturbation": "workbench.probes.rhythm.perturbation:perturbation",
    # analyses: heads
    "head_scores": "workbench.probes.heads.kinds:head_scores",
    "head_roles": "workbench.probes.heads.roles:head_roles",
    "role_ablation": "workbench.probes.heads.roles:role_ablation",
    "weight_circuits": "workbench.probes.heads.circuits:weight_circuits",
    "composition": "workbench.probes.heads.composition:composition",
    "head_weights": "workbench.probes.heads.weights:head_weights",
    "copy_suppression": "workbench.probes.heads.suppression:copy_suppression",
    "token_classes": "workbench.probes.heads.token_classes:token_classes",
    "positional_share": "workbench.probes.heads.positional:positional_share",
    "moved_tokens": "workbench.probes.heads.positional:moved_tokens",
    # analyses: similarity
    "sharing": "workbench.probes.similarity.sharing:sharing",
    "head_sharing": "workbench.probes.similarity.head_sharing:head_sharing",
    "replaced": "workbench.probes.similarity.sharing:replaced",
    "head_redundancy": "workbench.probes.similarity.redundancy:head_redundancy",
    "output_redundancy": "workbench.probes.similarity.redundancy:output_redundancy",
    "redundancy_curve": "workbench.probes.similarity.redundancy:redundancy_curve",
    "effective_rank": "workbench.probes.similarity.rank:effective_rank",
    "rank_bounds": "workbench.probes.similarity.rank:rank_bounds",
    "rank_collapse": "workbench.probes.similarity.rank:rank_collapse",
    "stream_collapse": "workbench.probes.similarity.streams:stream_collapse",
    "attention_diversity": "workbench.probes.similarity.diversity:attention_diversity",
    "diversity_loss": "workbench.probes.similarity.diversity:diversity_loss",
    "head_patterns": "workbench.probes.similarity.patterns:head_patterns",
    "planted_heads": "workbench.probes.similarity.patterns:planted_heads",
    "cluster_heads": "workbench.probes.similarity.clusters:cluster_heads",
    "map_stability": "workbench.probes.similarity.stability:map_stability",
    "row_stability": "workbench.probes.similarity.stability:row_stability",
    "step_stability": "workbench.probes.similarity.steps:step_stability",
    "reuse_external": "workbench.probes.similarity.steps:reuse_external",
    "temporal_bands": "workbench.probes.similarity.temporal:temporal_bands",
    "temporal_disparity": "workbench.probes.similarity.temporal:temporal_disparity",
    "guided": "workbench.probes.similarity.temporal:guided",
    "amplified": "workbench.probes.similarity.temporal:amplified",
    "motion_gain": "workbench.probes.similarity.temporal:motion_gain",
    "motion_edit": "workbench.probes.similarity.temporal:motion_edit",
    # analyses: importance
    "token_importance": "workbench.probes.importance.token_importance:token_importance",
    "generated_importance": "workbench.probes.importance.token_importance:generated_importance",
    "token_pruning": "workbench.probes.importance.token_pruning:token_pruning",
    "head_cascade": "workbench.probes.importance.head_cascade:head_cascade",
    "value_pruning": "workbench.probes.importance.head_cascade:value_pruning",
    "leave_one_head_out": "workbench.probes.importance.leave_one_out:leave_one_head_out",
    "first_order": "workbench.probes.importance.first_order:first_order",
    "sublayer_removal": "workbench.probes.importance.sublayers:sublayer_removal",
    "compare_rankings": "workbench.probes.importance.comparison:compare_rankings",
    "Heads": "workbench.probes.removal:Heads",
    "kv_groups": "workbench.probes.removal:kv_groups",
    # analyses: structure
    "distance_spectra": "workbench.probes.structure.spectra:distance_spectra",
    "receptive_fields": "workbench.probes.structure.spectra:receptive_fields",
    "pointer_fidelity": "workbench.probes.structure.pointers:pointer_fidelity",
    "oracle_recall": "workbench.probes.structure.oracle:oracle_recall",
    "sparsified": "workbench.probes.structure.oracle:sparsified",
    "rollout": "workbench.probes.structure.rollout:rollout",
    "flow": "workbench.probes.structure.flow:flow",
    "relevance": "workbench.probes.structure.relevance:relevance",
    "deletion_curve": "workbench.probes.structure.relevance:deletion_curve",
    "attributed_rollout": "workbench.probes.structure.attributed:attributed_rollout",
    "erased": "workbench.probes.structure.attributed:erased",
    "internal_consistency": "workbench.probes.structure.consistency:internal_consistency",
    "weighted_vote": "workbench.probes.structure.consistency:weighted_vote",
    "coding_rate": "workbench.probes.structure.coding_rate:coding_rate",
    "coding_rates": "workbench.probes.structure.coding_rate:coding_rates",
    "critical_bands": "workbench.probes.structure.critical_bands:critical_bands",
    "reach": "workbench.probes.structure.reach:reach",
    "selection_curves": "workbench.probes.structure.block_selection:selection_curves",
    # analyses: vision
    "Grid": "workbench.probes.vision.grid:Grid",
    "grid_of": "workbench.probes.vision.grid:grid_of",
    "image_mods": "workbench.probes.vision.on_patches:image_mods",
    "hops": "workbench.probes.vision.hops:hops",
    "attention_distance": "workbench.probes.vision.distances:attention_distance",
    "class_maps": "workbench.probes.vision.cls_maps:class_maps",
    "map_overlap": "workbench.probes.vision.cls_maps:map_overlap",
    "erasure_curve": "workbench.probes.vision.erasure:erasure_curve",
    "dependency_tree": "workbench.probes.vision.dependency:dependency_tree",
    "token_cut": "workbench.probes.vision.token_cut:token_cut",
    "outlier_tokens": "workbench.probes.vision.registers:outlier_tokens",
    "outlier_attention": "workbench.probes.vision.registers:outlier_attention",
    "outlier_erasure": "workbench.probes.vision.registers:outlier_erasure",
    "planted_images": "workbench.datasets.patches:planted_images",
    "hiprune": "workbench.probes.vision.hiprune:hiprune",
    "pruning_curve": "workbench.probes.vision.pruning:pruning_curve",
    "flow_heat": "workbench.probes.vision.vl_sam:flow_heat",
    "point_prompts": "workbench.probes.vision.vl_sam:point_prompts",
    # circuits
    "find_circuit": "workbench.probes.circuits.find:find_circuit",
    "methods": "workbench.probes.circuits.find:methods",
    "faithfulness": "workbench.probes.circuits.faithfulness:faithfulness",
    "auroc": "workbench.probes.circuits.judge:auroc",
    # results and errors
    "Result": "workbench.results:Result",
    "load_result": "workbench.results:load_result",
    "WorkbenchError": "workbench.errors:WorkbenchError",
}


def __getattr__(name: str) -> Any:
    if name == "mods":
        return importlib.import_module("workbench.mods")
    try:
        module, attribute = _NAMES[name].split(":")
    except KeyError:
        raise AttributeError(
            f"module 'workbench' has no attribute {name!r}; it has: {', '.join(sorted(_NAMES))}"
        ) from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_NAMES, "__version__", "mods"])
