"""What is particular to each sparse, low-rank, differential or Fourier family of Hugging Face."""

import builders as B
import pytest
import torch
import transformers as hf
from full_precision import FullPrecision
from sparse_nets import INDEXED, REFORMER, SPARSE_NETS
from sparse_runs import looking, made
from torch import Tensor
from torch.overrides import TorchFunctionMode

import workbench as wb
from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.mixers.chosen import RoutedMap
from workbench.models.hf import HFModel
from workbench.models.protocol import Tokens
from workbench.sites import Site


def longformer(cls="LongformerForMaskedLM", **options):
    config = {**{k: v for k, v in B.DECODER.items() if k != "num_key_value_heads"}, "attention_window": 4, **options}
    return HFModel(B.net(getattr(hf, cls), hf.LongformerConfig(**config)))


@pytest.mark.parametrize("padded", [False, True])
def test_longformer_with_global_tokens(padded):
    model, ids = longformer(), B.ids(2, 13)
    everywhere = torch.zeros_like(ids)
    everywhere[0, [0, 7]] = everywhere[1, [5]] = 1
    given = {"input_ids": ids, "global_attention_mask": everywhere}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, -2:] = 0
    with torch.no_grad(), FullPrecision(), looking(model) as seen:
        maps = model.run(given, maps=capture(blocks=4)).maps
    for key, found in maps.items():
        v, z, own = (seen[key][part][:, :, :13] for part in ("v", "z", "all"))
        chosen = everywhere.bool()[:, None, :, None]
        assert torch.allclose(torch.where(chosen, found.matvec(own), found.matvec(v)), z, atol=1e-10)
        local, everything = found.native()
        assert torch.allclose(local.matvec(v) + everything.matvec(own), z, atol=1e-10)
        weights = found.dense()
        real = torch.ones(13, dtype=torch.bool) if not padded else given["attention_mask"][0].bool()
        assert (weights[0, :, 0][:, real] > 0).all(), "a global token sees all"
        assert (weights[0, :, real, 7] > 0).all(), "and all see it"
        assert (weights[1, :, 0, 3:5] == 0).all()
        assert found.row_sum == ("<=1" if padded else "1")
        assert torch.allclose(weights[0, :, real].sum(-1), torch.ones(1, dtype=torch.float64))
        assert torch.allclose(found.received(), weights.sum(2))


def test_longformer_that_sets_its_global_token_by_itself():
    model = longformer("LongformerForSequenceClassification")
    with torch.no_grad():
        found = model.run(B.ids(), maps=capture()).maps[0]
    assert (found.dense()[:, :, 0] > 0).all()
    assert (found.dense()[..., 0] > 0).all()


def test_longformer_holds_nothing_of_n_by_n():
    model = longformer(max_position_embeddings=4100)
    everywhere = torch.zeros(1, 4000, dtype=torch.int64)
    everywhere[0, :2] = 1
    with torch.no_grad():
        run = model.run({"input_ids": B.ids(1, 4000), "global_attention_mask": everywhere}, maps=capture(layers=0))
    found = run.maps[0]
    with NoLarge(2**21):
        assert found.matvec(torch.ones(1, 4, 4000, 8)).shape == (1, 4, 4000, 8)
        assert found.received().shape == (1, 4, 4000)
        assert found.blocks(500).sum().round() == 4 * 4000


class NoLarge(TorchFunctionMode):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            assert out.numel() <= self.most, (func, out.shape)
        return out


def test_big_bird_of_a_short_text_is_full():
    model, _ = made("big_bird-sparse")
    assert model.manifest().layers[0].mixer == "softmax + window, global and random blocks"
    with torch.no_grad(), looking(model):
        found = model.run(B.ids(), maps=capture()).maps[0]
    assert type(found).__name__ == "SoftmaxMap"
    assert (found.dense() > 0).all()
    assert model.manifest().layers[0].mixer == "softmax", "transformers turns the model for good"
    with torch.no_grad():
        assert (model.run(B.ids(2, 23), maps=capture()).maps[0].dense() > 0).all()


def test_big_bird_counts_a_block_that_is_listed_twice_twice():
    model, ids = made("big_bird-sparse")
    with torch.no_grad():
        found = model.run(ids, maps=capture()).maps[0]
    first, middle, _ = found.maps
    assert (first.dense() > 0).all()
    listed = middle.indices[0, 0]
    assert ((listed == 0).sum(-1) == 1 + 2).all(), "the first block, and twice as a random one"
    row = found.dense()[0, 0, 10]
    assert (row > 0).nonzero().flatten().tolist() == [0, 1, *range(8, 14), 22]


def test_a_big_bird_that_decodes():
    options = {**{k: v for k, v in B.DECODER.items() if k != "num_key_value_heads"}, "attention_type": "original_full"}
    model = HFModel(B.net(hf.BigBirdForCausalLM, hf.BigBirdConfig(**options, is_decoder=True, sep_token_id=2)))
    assert model.shape.causal
    with torch.no_grad():
        whole = model.run(B.ids(), maps=capture()).maps
        first = model.run(B.ids()[:, :6], cache=True)
        second = model.run(B.ids()[:, 6:], cache=first.cache, maps=capture()).maps
    for key in (0, 1):
        assert (whole[key].dense().triu(1) == 0).all()
        assert torch.allclose(second[key].dense(), whole[key].dense()[:, :, 6:], atol=1e-12)


def reformer(**options):
    config = {**REFORMER, "attn_layers": ["local", "lsh"], "is_decoder": False, **options}
    return HFModel(B.net(hf.ReformerForMaskedLM, hf.ReformerConfig(**config)))


@pytest.mark.parametrize("options", [{"num_hashes": 1}, {"num_hashes": 3, "hash_seed": None, "lsh_num_chunks_after": 1},
                                     {"num_buckets": [2, 4], "local_num_chunks_before": 0}])  # fmt: skip
@pytest.mark.parametrize("length", [3, 19])
def test_reformer_reads_its_buckets_from_the_run(options, length):
    model, ids = reformer(**options), B.ids(2, length)
    with torch.no_grad(), FullPrecision(), looking(model) as seen:
        maps = model.run(ids, maps=capture()).maps
    for key, found in maps.items():
        v, z = (seen[key][part][:, :, :length] for part in ("v", "z"))
        assert torch.allclose(found.matvec(v), z, atol=1e-10)
    assert (maps[1].dense().diagonal(0, 2, 3) == 0).all() or length > 4
    full = length <= 4
    assert (maps[0].dense() > 0).all() if full else (maps[0].dense() == 0).any(), "local chunks"


def test_a_causal_reformer_sees_no_token_behind_and_keeps_no_cache():
    model, ids = made("reformer-causal")
    assert model.shape.causal
    with torch.no_grad():
        maps = model.run(ids, maps=capture()).maps
        assert all((found.dense().triu(1) == 0).all() for found in maps.values())
        with pytest.raises(Refused, match="run the whole text without cache"):
            model.run(ids, cache=True)


def test_nystroemformer_is_a_product_and_a_band():
    model, ids = made("nystromformer")
    with torch.no_grad():
        found = model.run(ids, maps=capture()).maps[0]
    product, band = found.native()
    (first, inverse), second = product.left.native(), product.right
    assert [m.shape[2:] for m in (first, inverse, second)] == [(15, 5), (5, 5), (5, 15)]
    assert first.row_sum == second.row_sum == "1"
    assert torch.allclose(product.dense(), first.dense() @ inverse.dense() @ second.dense())
    weights = band.dense()
    assert (weights.triu(2) == 0).all()
    assert (weights.tril(-2) == 0).all()
    assert torch.equal(weights[0, :, 7, 6:9], model._layers[0].module.conv.weight[:, 0, :, 0])
    with torch.no_grad(), pytest.raises(Refused, match=r"makes its landmarks of 15 positions .* has 11; pad it to 15"):
        model.run(B.ids(), maps=capture())


def test_fnet_takes_padding_for_text_and_says_so():
    model, ids = made("fnet")
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -2:] = False
    with torch.no_grad(), pytest.raises(Refused, match="takes padding for text"):
        model.run(Tokens(ids, mask), maps=capture())


def test_diffllama_is_the_difference_of_its_softmaxes():
    model, ids = made("diffllama")
    net = model.model
    net.set_attn_implementation("eager")
    with torch.no_grad(), FullPrecision():
        run = model.run(ids, maps=capture())
        weights = net(ids, output_attentions=True).attentions
    for key, found in run.maps.items():
        m = net.model.layers[key].self_attn
        products = (m.lambda_q1 * m.lambda_k1, m.lambda_q2 * m.lambda_k2)
        one, two = (x.detach().sum(dtype=torch.float32).exp().double() for x in products)
        strength = one - two + m.lambda_init
        first, second = weights[key].chunk(2, 1)
        assert torch.allclose(found.dense(), first - strength * second, atol=1e-12)
        assert torch.allclose(found.native()[0].dense(), first, atol=1e-12)
        assert torch.allclose(found.row_sums(), 1 - strength.expand(2, 2, 11), atol=1e-12)
    with pytest.raises(Refused, match="steps cannot be captured"):
        wb.generate(model, ids, steps=2, maps=capture())


class Scores(TorchFunctionMode):
    """What ``topk`` is called on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.topk and args[0].shape[1:] == (11, 11):
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_indexed_layers_tell_what_was_chosen_and_by_what(name, implementation):
    model, ids = made(name)
    model.model.set_attn_implementation(implementation)
    with torch.no_grad(), Scores() as scores:
        maps = model.run(ids, maps=capture()).maps
    assert len(scores.seen) == 2
    for key, found in maps.items():
        assert isinstance(found, RoutedMap)
        assert found.row_sum == "1"
        assert ((found.dense() > 0).sum(-1) == torch.arange(1, 12).clamp(max=4)).all()
        indexer, seen = found.native(), scores.seen[key][:, None].float()
        visible = torch.ones(11, 11, dtype=torch.bool).tril()
        assert torch.allclose(indexer.dense()[..., visible], seen[..., visible], atol=1e-6)
        for row in (5, 10):
            best = indexer.dense()[:, :, row, : row + 1].topk(4).indices
            assert found.kept[:, :, row].gather(-1, best).all()
            assert (found.dense()[:, :, row].gather(-1, best.expand(-1, 4, -1)) > 0).all()


def test_layers_that_share_the_choice_of_another_are_exact_too():
    config = hf.GlmMoeDsaConfig(
        **{**B.DECODER, **INDEXED}, mlp_layer_types=["dense"] * 2, indexer_types=["full", "shared"]
    )
    net = B.net(hf.GlmMoeDsaForCausalLM, config, implementation="eager")
    with torch.no_grad():
        maps = HFModel(net).run(B.ids(), maps=capture()).maps
        weights = net(B.ids(), output_attentions=True).attentions
    assert torch.equal(maps[1].dense() > 0, maps[0].kept.expand(-1, 4, -1, -1) & (maps[1].dense() > 0))
    for key in (0, 1):
        assert torch.allclose(maps[key].dense(), weights[key], atol=1e-6)


def test_indexed_maps_of_a_continued_text():
    model, ids = made("deepseek_v32")
    with torch.no_grad():
        whole = model.run(ids, maps=capture()).maps[1]
        first = model.run(ids[:, :7], cache=True)
        step = model.run(ids[:, 7:9], cache=first.cache, maps=capture()).maps[1]
    assert torch.equal(step.kept, whole.kept[:, :, 7:9, :9])
    assert torch.allclose(step.dense(), whole.dense()[:, :, 7:9, :9], atol=1e-10)
    assert torch.allclose(step.native().dense(), whole.native().dense()[:, :, 7:9, :9], atol=1e-5)
    with pytest.raises(Refused, match="run with cache= step by step"):
        wb.generate(model, ids[:, :4], steps=6, maps=capture())


def test_layers_that_share_keys_and_values_are_exact():
    """Gemma 3n: the last layers reuse the keys and values of the last one of their kind."""
    model, ids = made("gemma3n")
    read = [Site("v", i) for i in range(4)] + [Site("z", i) for i in range(4)]
    with torch.no_grad():
        run = model.run(ids, read=read, maps=capture())
    for mine, theirs in ((2, 0), (3, 1)):
        assert torch.equal(run.maps[mine].scores.k, run.maps[theirs].scores.k)
        assert torch.equal(run.acts[Site("v", mine)], run.acts[Site("v", theirs)])
        z = run.maps[mine].matvec(run.acts[Site("v", mine)].transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(z, run.acts[Site("z", mine)], atol=1e-10)
    assert "residual stream" in model.manifest().layers[0].missing


def test_a_sink_takes_what_the_keys_do_not_get():
    case = B.hugging_face("gpt_oss")
    with torch.no_grad():
        maps = case.model.run(case.inputs, maps=capture()).maps
    for key, found in maps.items():
        sink = case.net.model.layers[key].self_attn.sinks.double()[None, :, None]
        assert torch.allclose(found.row_sums() + (sink - found.lse).exp(), torch.ones(1, dtype=torch.float64))


def test_a_shared_layer_has_a_map_of_every_pass():
    model, ids = made("albert")
    assert model.layers() == [0, 1, 2]
    assert [layer.module is model._layers[0].module for layer in model._layers] == [True, True, False]
    sites = [Site("v", i) for i in range(3)] + [Site("z", i) for i in range(3)]
    with torch.no_grad():
        run = model.run(ids, read=sites, maps=capture())
        once = model.run(ids, edit={Site("z", 1): torch.zeros_like}, read=[Site("z", 0), Site("z", 1)])
    for i in range(3):
        z = run.maps[i].matvec(run.acts[Site("v", i)].transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(z, run.acts[Site("z", i)], atol=1e-10)
    assert not torch.allclose(run.maps[0].dense(), run.maps[1].dense(), atol=1e-3)
    assert torch.equal(once.acts[Site("z", 0)], run.acts[Site("z", 0)])
    assert (once.acts[Site("z", 1)] == 0).all()


def test_a_decoder_without_an_encoder_gives_the_maps_of_what_runs(monkeypatch):
    model, ids = made("bart")
    with torch.no_grad():
        assert tuple(model.run(ids, maps=capture()).maps) == ("decoder.0", "decoder.1")
        with pytest.raises(WorkbenchError, match=r"layer cross\.0 of BartForCausalLM .*did not run its attention"):
            model.run(ids, maps=capture(layers=["decoder.0", "cross.0"]))
        given = {"input_ids": ids, "encoder_hidden_states": torch.randn(2, 5, B.D).double()}
        maps = model.run(given, maps=capture()).maps
    assert maps["cross.1"].shape == (2, 4, 11, 5)
    assert len(maps) == 4
    for layer in model._layers[2:]:
        monkeypatch.setattr(layer.module, "forward", lambda hidden_states, **_: (hidden_states, None))
    with torch.no_grad(), pytest.raises(WorkbenchError, match=r"layer cross\.0 of BartForCausalLM .*did not run"):
        model.run(given, maps=capture())


# ------------------------------------------------------------------ requests


def test_summaries_and_stores(tmp_path):
    for name in ("longformer", "deepseek_v32", "swin", "reformer"):
        model, given = made(name, torch.float32)
        with torch.no_grad():
            kept = model.run(given, maps=capture(blocks=4, stats=("received", "entropy"), topk=2)).maps[1]
            told = model.run(given, maps=capture(blocks=4, stats=("received", "entropy"), topk=2, keep=False)).maps[1]
        assert torch.equal(kept.received(), told.received())
        assert torch.equal(kept.blocks(4), told.blocks(4))
        assert torch.equal(kept.topk(2).indices, told.topk(2).indices)
        with torch.no_grad():
            model.run(given, maps=capture(store=tmp_path / name))
        found = wb.open_maps(tmp_path / name)[1]
        assert torch.allclose(found.dense(), kept.dense(), atol=1e-6)


def test_compiled_models_are_refused():
    with pytest.raises(Refused, match="compiled"):
        HFModel(torch.compile(SPARSE_NETS["longformer"]())).run(B.ids(), maps=capture())
