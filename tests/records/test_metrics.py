"""One module knows the names of metrics: which one ranks results, and which way is better."""

from __future__ import annotations

import pytest

from bs_exp.records import metrics


@pytest.mark.parametrize(
    ("names", "objective"),
    [
        (["acc/piqa", "ppl_tokens/text", "ppl/text", "ppl/other"], "ppl/text"),
        (["cosine/text", "relative_error/text", "masked_ppl/text"], "masked_ppl/text"),
        (["cosine/text", "seq2seq_ppl_tokens/text", "seq2seq_ppl/text"], "seq2seq_ppl/text"),
        (["relative_error/text", "cosine/text", "cosine/other"], "cosine/text"),
        (["draft_tokens_per_pass/text", "draft_acceptance/text"], "draft_acceptance/text"),
        (["word_perplexity/wikitext", "acc/piqa"], None),
        ([], None),
    ],
)
def test_the_default_objective_is_a_perplexity_else_the_similarity(names: list[str], objective: str | None) -> None:
    assert metrics.default_objective(names) == objective


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *((f"{kind}/text", True) for kind in metrics.PERPLEXITIES),
        ("cosine/text", False),
        ("relative_error/text", True),
        ("acc/mean", False),
        ("word_perplexity/wikitext", True),
        (metrics.DECODE, False),
        *((metrics.metric(metrics.SIZE, name), True) for name in metrics.SIZES),
    ],
)
def test_which_way_is_better(name: str, lower: bool) -> None:
    assert metrics.lower_is_better(name) == lower


def test_what_is_no_quality_ranks_nothing() -> None:
    found = {
        **{"acc/a": 0.5, "acc_stderr/a": 0.1, "acc/b": 0.7, "acc/mean": 0.6, "acc_norm/a": 0.5, "acc_norm/mean": 0.5},
        **{"ppl/text": 3.0, "ppl_tokens/text": 10, "ppl_nonfinite/text": 1, "ppl_text_sha256/text": "0f"},
        **{"cosine/text": 1.0, "similarity_tokens/text": 3, metrics.DECODE: 2.0, metrics.COMPRESSION_SECONDS: 1.0},
        **{"items/a": 4, "lm_eval/version": "0.4", "draft/prompt_length": 8, "draft_tokens/text": 9},
        **{
            "draft_speedup/text": 1.1,
            "draft_speedup_low/text": 1.0,
            "draft_drift/text": 0.1,
            "draft_speedup_bound/text": 2,
        },
    }
    # The mean of one task is that task.
    assert metrics.quality([found]) == ["ppl/text", "acc/a", "acc/b", "acc_norm/a", "cosine/text", "acc/mean"]
    assert metrics.headlines(metrics.quality([found]), "cosine/text") == ["ppl/text", "cosine/text", "acc/mean"]


def test_how_something_was_measured_is_no_result() -> None:
    for name in (
        "ppl_tokens/a",
        "ppl_text_sha256/a",
        "items/a",
        "task_version/a",
        "lm_eval/version",
        "draft/prompt_length",
    ):
        assert metrics.is_setting(name)
    for name in ("throughput/device", "throughput/repeats"):
        assert metrics.is_setting(name)
    for name in ("ppl/a", "acc/a", "acc_stderr/a", "ppl_nonfinite/a", "throughput/decode_tok_s", "cost/compression_s"):
        assert not metrics.is_setting(name)


def test_perplexities_over_those_of_the_dense_model() -> None:
    found = {
        "dense": {"ppl/a": 10.0, "acc/b": 0.5, "masked_ppl/c": 4.0},
        "compressed": {"ppl/a": 12.5, "acc/b": 0.4, "masked_ppl/c": 6.0, "ppl/new": 3.0, "ppl_tokens/a": 9},
    }
    assert metrics.dense_ratios(found) == {"ppl_ratio/a": 1.25, "masked_ppl_ratio/c": 1.5}
    assert metrics.dense_ratios({}) == {}
