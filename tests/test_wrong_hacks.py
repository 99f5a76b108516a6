"""Each wrong edit of hacks/wrong is refused by the self-check, with the sentence that names it."""
import importlib
import re

import pytest
from helpers import ROOT

CACHE, PADDED = "one by one, what the KV cache gives is not .* another model", "but only behind padding"
SENTENCES = {
    "alibi_sign": "has a bias on distances the wrong sign",
    "batch_mean": "^what a text gives changes with the texts beside it",
    "batch_mean_in_training": "^in training mode .* rows of a batch see each other",
    "carried_over_in_training": "^in training mode the same text twice .* carried from call to call",
    "dropout_in_eval": "something random that eval mode does not turn off",
    "head_before_final_norm": "the final norm included", "in_place": "that it is given in place",
    "max_norm": "a forward pass changes weights .trunk.wte.weight",
    "moe_capacity": "^what a text gives changes with the texts beside it",
    "no_mask_for_several": "several tokens are read at once", "norm_over_time": "not causal",
    "position_from_padded_index": PADDED, "recurrent_runs_into_pads": PADDED, "rope_off_by_one": CACHE,
    "score_one_off": "is it read one position too early", "softmax_in_bf16": "rounded to bfloat16",
    "softcap_not_in_generation": "generation uses only GPT.logits", "temperature_uncached_only": CACHE,
    "window_looks_ahead": "not causal", "window_uncached_only": CACHE}


def test_none_is_missing():
    assert {path.stem for path in (ROOT / "hacks/wrong").glob("*.patch")} == set(SENTENCES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_it_is_refused_by_name(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    wrong_hacks = importlib.import_module("wrong_hacks")
    (said, _), = wrong_hacks.tried(ROOT / f"hacks/wrong/{name}.patch", wrong_hacks.self_check)
    assert re.search(SENTENCES[name], said)
