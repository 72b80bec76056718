"""The compressed model as draft of its dense original: what is counted, against drafting by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.errors import ConfigError
from bs_exp.evaluation.draft import Draft, ratio_with_error
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import module_of
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import read_record
from bs_exp.types import LoadedModel, SharedFactors, WeightGroup
from tests.support.factorised import compressed_twin

TEXT = "Grace Hopper wrote the first compiler; it was hard to believe that it would run. " * 8


@dataclass(frozen=True)
class Words:
    def read(self) -> tuple[str, Mapping[str, object]]:
        return TEXT, {"fingerprint": "words"}


DRAFT = Draft(
    corpora={"words": Words()},
    prompt_length=10,
    generated_length=12,
    drafted_tokens=3,
    num_prompts=5,
    special_tokens=False,
)


def cut_by_svd(dense: LoadedModel, rank: int) -> LoadedModel:
    """A compressed twin that is near its original: every matrix of rank 32 cut by SVD, in a group of its own."""
    factors = []
    for m in dense.architecture.matrices:
        weight = module_of(dense.module, m).weight.detach().double().T
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        group = WeightGroup(m.matrix, (m.layer,), m.d_in, m.d_out)
        keep = min(rank, len(s) - 1)
        factors.append(SharedFactors(group, u[:, :keep], {m.layer: s[:keep, None] * v[:keep]}))
    module = twin(dense.module)
    replace_matrices(module, dense.architecture, factors, PlainLayout())
    return replace(dense, module=module, original=dense)


def prompts(model: LoadedModel, count: int = 5) -> list[Tensor]:
    ids = torch.tensor(model.tokenizer(TEXT).input_ids)
    cut = ids[: len(ids) // 10 * 10].view(-1, 10)
    return [cut[round(i * (len(cut) - 1) / (count - 1))][None] for i in range(count)]


@torch.no_grad()
def likeliest(module: PreTrainedModel, ids: Tensor) -> Tensor:
    """The most likely token behind every position, without a cache."""
    return module(input_ids=ids, use_cache=False).logits[0].argmax(-1)


def drafted_by_hand(dense: LoadedModel, draft: LoadedModel, prompt: Tensor, count: int, length: int) -> dict[str, Any]:
    """Algorithm 1 of 2211.17192 for greedy decoding, every token from the whole sequence."""
    end = dense.module.generation_config.eos_token_id
    known, passes, drafted, accepted = prompt, 0, 0, 0
    while known.shape[1] < prompt.shape[1] + length and (known.shape[1] == 10 or int(known[0, -1]) != end):
        tokens: list[int] = []
        room = prompt.shape[1] + length - known.shape[1] - 1
        while len(tokens) < min(count, room) and end not in tokens:
            whole = torch.cat([known, torch.tensor([tokens], dtype=torch.long).view(1, -1)], dim=1)
            tokens.append(int(likeliest(draft.module, whole)[-1]))
        whole = torch.cat([known, torch.tensor([tokens], dtype=torch.long).view(1, -1)], dim=1)
        own = likeliest(dense.module, whole)[known.shape[1] - 1 :].tolist()
        right = next((i for i, token in enumerate(tokens) if token != own[i]), len(tokens))
        passes, drafted, accepted = passes + 1, drafted + len(tokens), accepted + right
        added = own[: right + 1]
        added = added[: added.index(end) + 1] if end in added else added
        known = torch.cat([known, torch.tensor([added])], dim=1)
    return {"passes": passes, "drafted": drafted, "accepted": accepted, "text": known[0, prompt.shape[1] :]}


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_counted_is_what_drafting_by_hand_counts(count: int) -> None:
    dense = tiny_random("llama")
    compressed = cut_by_svd(dense, 29)
    alone, found = replace(DRAFT, drafted_tokens=count).compare(dense, compressed)
    by_hand = [drafted_by_hand(dense, compressed, prompt, count, 12) for prompt in prompts(dense)]
    drafted, accepted, passes = (sum(one[name] for one in by_hand) for name in ("drafted", "accepted", "passes"))
    assert 0.1 < accepted / drafted < 0.95  # else the test would say little
    written = [len(one["text"]) for one in by_hand]
    assert found["draft_acceptance/words"] == accepted / drafted
    assert found["draft_tokens_per_pass/words"] == sum(written) / passes
    assert found["draft_tokens/words"] == drafted
    assert found["draft_same_text/words"] == 1.0
    assert found["draft_text_sha256/words"] == alone["draft_text_sha256/words"] == "words"
    assert alone["draft_tokens_per_pass/words"] == 1.0
    parts = [(one["accepted"], one["drafted"]) for one in by_hand]
    assert (found["draft_acceptance/words"], found["draft_acceptance_stderr/words"]) == ratio_with_error(
        *zip(*parts, strict=True)
    )
    # Reading the weights: a pass of the dense model costs 1, one of the draft the share of the bytes that it reads.
    size = {name: sum(p.nbytes for p in m.module.parameters()) for name, m in (("d", dense), ("c", compressed))}
    tied = dense.module.config.tie_word_embeddings
    rows = 0 if tied else dense.module.get_input_embeddings().weight.nbytes
    share = (size["c"] - rows) / (size["d"] - rows)
    assert found["draft_speedup_bound/words"] == pytest.approx(sum(written) / (passes + drafted * share))
    assert set(DRAFT.compared(dense)) <= found.keys()


def test_a_text_that_ends_early_is_counted_to_its_end() -> None:
    dense = tiny_random("llama")
    compressed = cut_by_svd(dense, 29)
    whole = drafted_by_hand(dense, compressed, prompts(dense)[0], 3, 12)["text"]
    dense.module.generation_config.eos_token_id = int(whole[4])
    found = replace(DRAFT, num_prompts=1).compare(dense, compressed)[1]
    by_hand = drafted_by_hand(dense, compressed, prompts(dense)[0], 3, 12)
    assert len(by_hand["text"]) <= 5
    assert found["draft_tokens_per_pass/words"] == len(by_hand["text"]) / by_hand["passes"]
    assert found["draft_acceptance/words"] == by_hand["accepted"] / by_hand["drafted"]
    assert "draft_acceptance_stderr/words" not in found  # of one prompt there is none


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "bloom", "mixtral"])
def test_the_text_is_the_dense_models_own_in_every_family(family: str) -> None:
    dense = tiny_random(family)
    compressed = replace(dense, module=compressed_twin(dense), original=dense)
    kept = dense.module.generation_config, compressed.module.generation_config
    found = replace(DRAFT, num_prompts=2, generated_length=8).compare(dense, compressed)[1]
    assert found["draft_same_text/words"] == 1.0
    assert (dense.module.generation_config, compressed.module.generation_config) == kept
    assert not dense.module._forward_pre_hooks


def test_a_draft_that_is_the_dense_model_is_always_right_and_settings_of_checkpoints_change_nothing() -> None:
    dense = tiny_random("llama")
    dense.module.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, num_beams=1)
    same = replace(dense, module=twin(dense.module), original=dense)
    same.module.generation_config.update(num_assistant_tokens=9, assistant_confidence_threshold=0.9)
    found = DRAFT.evaluate(same)
    assert found["draft_acceptance/words"] == 1.0
    assert found["draft_tokens_per_pass/words"] == 4.0  # three drafted, and one of its own
    assert DRAFT.evaluate(dense)["draft_tokens_per_pass/words"] == 1.0


def test_the_error_of_a_ratio() -> None:
    """With equal wholes it is that of a mean."""
    parts = [1.0, 3.0, 2.0, 2.5]
    ratio, error = ratio_with_error(parts, [4.0] * 4)
    assert ratio == statistics.mean(parts) / 4
    assert error == pytest.approx(statistics.stdev(parts) / 4 / 2)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_that_write_no_text_are_told_what_to_use(family: str) -> None:
    with pytest.raises(ConfigError, match=r"Speculative decoding .* needs a causal language model, .* Use evaluation="):
        DRAFT.check(tiny_random(family))


def test_what_cannot_work_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_random("llama")
    DRAFT.check(dense)
    with pytest.raises(ConfigError, match="add up to 513 tokens, but the model has 512 positions"):
        replace(DRAFT, prompt_length=501).check(dense)
    monkeypatch.setattr(type(dense.module), "_is_stateful", True)
    with pytest.raises(ConfigError, match="takes back tokens that were drafted in vain, which LlamaForCausalLM"):
        DRAFT.check(dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": {}}, "corpora is empty"),
        ({"drafted_tokens": 0}, "drafted_tokens must be a whole number of at least 1, got 0"),
        ({"generated_length": 1}, "generated_length must be a whole number of at least 2, got 1"),
        ({"num_prompts": 0}, "num_prompts must be"),
        ({"special_tokens": "never"}, "special_tokens must be true"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(DRAFT, **change)


def test_a_run_records_it_and_it_can_be_the_objective(
    cli: Callable[..., Any], tiny: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    settings = [setting for setting in tiny if not setting.startswith("evaluation")]
    done = cli(
        *settings, "evaluation=draft", "~evaluation.corpora.python_docs", "+corpus@evaluation.corpora.words=text",
        f"evaluation.corpora.words.files=[{texts}/B.txt]", "evaluation.prompt_length=8",
        "evaluation.generated_length=6", "evaluation.num_prompts=6", "hydra.run.dir=run",
    )  # fmt: skip
    assert done.status == 0, done.err
    record = read_record(tmp_path / "run")
    compressed = record.metrics["compressed"]
    assert record.metrics["dense"]["draft_tokens_per_pass/words"] == 1.0
    assert record.objective == compressed["draft_acceptance/words"]  # by default, where there is no perplexity
    assert "draft (both)" in record.timings
    assert all(name in done.out for name in ("draft_acceptance/words", "draft_tokens_per_pass/words", "draft_speedup/"))
    refused = cli(*settings, "evaluation=draft", "objective=draft_accepted/python_docs", "hydra.run.dir=other")
    assert refused.status == 1 and "draft_acceptance/python_docs" in refused.err and not Path("other").exists()
