"""What statistics take of a router is what transformers gives the family's own experts.

The routers of the tiny checkpoints are twisted so that tokens meet ties, within the chosen
experts and at their edge, and logits of thousands with either sign.
"""

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from tiny_checkpoints import load_tensors, read_config, save_tensors, write_checkpoint
from tiny_families import EXPERTS, TINY
from tiny_parameters import families
from tiny_runs import CPU, routed_to, same_in, some_tokens
from transformers import AutoModelForCausalLM

from ream_stream.checkpoint.reader import open_checkpoint
from ream_stream.compression.observer import Observer
from ream_stream.model.families import family_of
from ream_stream.model.finite import ExcludedSequences
from ream_stream.model.streamed_model import Batch, StreamedModel

HUGE = 1e4
TWINS = ((0, 1), (2, 3), (4, 6))
"""Experts that a router cannot tell apart; the last two have huge logits."""
TOKENS = some_tokens()
GIVEN = {"gemma4_text"}
SCALING = {"llama4_text"}
SIGMOID = {
    name
    for name in TINY
    if any("bias" in router for router in TINY[name].routers) and name != "gpt_oss"
} - {"ernie4_5_moe", "deepseek_v4"} | {"flint"}


def twisted(folder, name):
    """Write a checkpoint of a family whose routers meet ties and huge logits."""
    write_checkpoint(folder, name, torch.float32)
    tensors = load_tensors(folder)
    for key, tensor in tensors.items():
        if not key.endswith(TINY[name].routers):
            continue
        rows = tensor.movedim(tensor.shape.index(EXPERTS), 0)
        if rows.dim() > 1 and rows.shape[1] > 1:
            rows[4] *= HUGE
        for one, other in TWINS:
            rows[other] = rows[one]
    save_tensors(folder, tensors)
    return folder


@dataclass
class Seen:
    """What the modules of one layer of transformers' own model were given and gave."""

    logits_TE: torch.Tensor | None = None
    hidden_TH: torch.Tensor | None = None
    index_TK: torch.Tensor | None = None
    weight_TK: torch.Tensor | None = None
    norm_TE: torch.Tensor | None = None
    scale_E: torch.Tensor | float = 1.0


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """Give a twisted checkpoint of a family, tokens, and what transformers makes of them."""

    @cache
    def give(name):
        folder = twisted(tmp_path_factory.mktemp("routers") / name, name)
        return folder, TOKENS, seen_in_transformers(folder, TOKENS.input_ids_SL)

    return give


@torch.no_grad()
def seen_in_transformers(folder, ids_BL):
    """Run the whole model; return what was seen, by layer with experts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for layer in model.model.layers:
        modules = list(layer.modules())
        experts = [m for m in modules if getattr(m, "down_proj", None) is not None]
        experts = [m for m in experts if getattr(m.down_proj, "ndim", 0) == 3]
        if not experts:
            continue
        (router,) = (
            m for m in modules if type(m).__name__.endswith(("Router", "HunYuanMoEV1Gate"))
        )
        seen = Seen(scale_E=getattr(router, "per_expert_scale", 1.0))
        found.append(seen)
        place = 1 if type(router).__name__ == "Llama4Router" else 0
        router.register_forward_hook(
            lambda _module, _args, output, seen=seen, place=place: setattr(
                seen, "logits_TE", output[place]
            )
        )
        experts[0].register_forward_pre_hook(
            lambda module, args, seen=seen: take(seen, module, args)
        )
    model(input_ids=ids_BL, use_cache=False)
    return found


def take(seen, experts, args):
    """Note what the experts module receives, and what each expert makes of every token."""
    seen.hidden_TH, seen.index_TK, seen.weight_TK = routed_to(args)
    tokens = len(seen.hidden_TH)
    if len(args) == 1:
        made_EH = experts.forward(seen.hidden_TH.repeat(EXPERTS, 1))
        made_TEH = made_EH.view(EXPERTS, tokens, -1).transpose(0, 1)
        # scores of 0 tell nothing of the choice
        seen.index_TK = seen.logits_TE.topk(1).indices
    else:
        one_T1 = torch.ones(tokens, 1, dtype=seen.weight_TK.dtype)
        all_T1 = [torch.full_like(one_T1, e, dtype=torch.int64) for e in range(EXPERTS)]
        made = [experts.forward(seen.hidden_TH, e_T1, one_T1) for e_T1 in all_T1]
        made_TEH = torch.stack(made, dim=1)
    seen.norm_TE = made_TEH.double().norm(dim=-1)


def both(one, other, routed):
    one(routed)
    other(routed)


@torch.no_grad()
def heard_while_streaming(folder, tokens):
    """Run layer by layer; return what the listener heard and the sums, by layer."""
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, torch.float32, CPU)
    batch = Batch(input_ids_BL=tokens.input_ids_SL, attention_mask_BL=None)
    found, hidden_BLH = [], None
    with model.open_outside():
        for layer in model.layers:
            with model.open_layer(layer.index) as experts:
                if experts is None:
                    hidden_BLH = model.run_layer(layer.index, batch, hidden_BLH)
                    continue
                observer = Observer(
                    family_of(checkpoint.config),
                    EXPERTS,
                    None,
                    tokens,
                    ExcludedSequences(tokens),
                    gate_term=True,
                    batch_sequences=len(batch.input_ids_BL),
                    device=CPU,
                )
                heard = []
                with observer.attached(model.router(layer.index)):
                    experts.listener = partial(both, observer.listener(0, batch), heard.append)
                    hidden_BLH = model.run_layer(layer.index, batch, hidden_BLH)
                observer.finish(layer.index)
                found.append((*heard, observer))
    return found


def score_of(name, logits_TE):
    """Return the scores by the definitions, in float64."""
    logits_TE = logits_TE.double()
    if name in GIVEN:
        return logits_TE
    if name in SIGMOID:
        return 1 / (1 + torch.exp(-logits_TE))
    if name == "deepseek_v4":
        return torch.logaddexp(logits_TE, torch.zeros_like(logits_TE)).sqrt()
    raised_TE = torch.exp(logits_TE - logits_TE.amax(1, keepdim=True))
    return raised_TE / raised_TE.sum(1, keepdim=True)


@pytest.mark.parametrize("name", families())
def test_statistics_are_of_what_the_family_gives_its_experts(met, name):
    folder, tokens, own = met(name)
    streamed = heard_while_streaming(folder, tokens)
    assert len(own) == len(streamed) == 3 + (name == "qwen3_next") - len(TINY[name].dense)
    for theirs, (ours, observer) in zip(own, streamed, strict=True):
        assert same_in(name, torch.float32)(ours.hidden_TH, theirs.hidden_TH)
        assert torch.equal(ours.index_TK, theirs.index_TK)
        assert torch.equal(ours.weight_TK, theirs.weight_TK)
        assert ours.index_TK.shape[1] == TINY[name].top_k
        index_TK, score_TE = theirs.index_TK, score_of(name, theirs.logits_TE)
        gate_TK = theirs.weight_TK.double()
        norm_TK, score_TK = (t.gather(1, index_TK) for t in (theirs.norm_TE, score_TE))
        if name in SCALING:  # the score is in the inputs, and so in the norms
            score_TK = torch.ones_like(score_TK)
        want = {
            "count_E": torch.ones_like(gate_TK),
            "norm_E": norm_TK,
            "gate_norm_E": gate_TK * norm_TK,
            "gate_norm_squared_E": (gate_TK * norm_TK) ** 2,
            "score_norm_E": score_TK * norm_TK,
            "score_squared_norm_E": score_TK**2 * norm_TK,
        }
        sums = observer.sums.total()
        for key, value_TK in want.items():
            sum_E = torch.zeros(EXPERTS, dtype=torch.float64)
            sum_E.index_add_(0, index_TK.reshape(-1), value_TK.reshape(-1))
            torch.testing.assert_close(getattr(sums, key), sum_E, rtol=1e-4, atol=1e-9)
        assert observer.gram is not None
        assert observer.gram.gram_EE.isfinite().all()


@pytest.mark.parametrize("name", families())
def test_the_scores_are_those_that_the_family_weighs_its_experts_by(met, name):
    """So is the table's score function right: coefficients are in the ratio of the scores."""
    folder, _, own = met(name)
    for seen in own:
        scale_E = torch.as_tensor(seen.scale_E).expand(EXPERTS).double()
        score_TE = family_of(read_config(folder)).score(seen.logits_TE).double() * scale_E
        score_TK = score_TE.gather(1, seen.index_TK)
        if name == "phimoe":  # each of the two is weighed among those near it
            continue
        if name in SCALING:
            assert torch.equal(seen.weight_TK, torch.ones_like(seen.weight_TK))
            continue
        sums = (score_TK.sum(1, keepdim=True), seen.weight_TK.double().sum(1, keepdim=True))
        told = (sums[0] > 1e-6).squeeze(1) & (sums[1].abs() > 1e-6).squeeze(1)
        assert told.any()
        torch.testing.assert_close(
            (seen.weight_TK.double() / sums[1])[told],
            (score_TK / sums[0])[told],
            rtol=1e-3,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", families())
def test_the_twisted_routers_meet_ties_and_huge_logits(met, name):
    """What the tests above are worth."""
    _, _, own = met(name)
    ties, largest, least = 0, 0.0, 0.0
    for seen in own:
        logits_TE = seen.logits_TE.log() if name in GIVEN else seen.logits_TE
        for one, other in TWINS:
            chosen_T = (seen.index_TK == one).any(1) ^ (seen.index_TK == other).any(1)
            equal_T = logits_TE[:, one] == logits_TE[:, other]
            ties += int((chosen_T & equal_T).sum())
        largest, least = (
            max(largest, float(logits_TE.max())),
            min(least, float(logits_TE[logits_TE.isfinite()].min())),
        )
    assert ties
    if name not in GIVEN:
        assert largest > HUGE / 10
        assert least < -HUGE / 10
