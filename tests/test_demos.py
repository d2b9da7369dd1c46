"""What `assay demo` runs."""

from __future__ import annotations

import pytest

from assay import demos
from assay.core.errors import InputError
from assay.core.method import KINDS, listed


def _names(study):
    arms = {arm.name for arm in study.arms}
    return arms | {m if isinstance(m, str) else m["name"] for m in study.methods}


def test_every_has_the_methods_of_the_league_and_the_usual_a_fast_choice():
    usual, every = demos.study("text", []), demos.study("text", [], every=True)
    assert {"random", "bm25", "dsir", "loss_diff", "trak"} <= _names(usual)
    assert len(_names(every)) > 2 * len(_names(usual))
    assert {"minhash", "gopher", "fasttext", "rho", "density", "influence"} <= _names(every)
    assert (usual.pool, usual.train, usual.verify) == (every.pool, every.train, every.verify)


def test_changes_come_after_the_short_form():
    assert demos.study("text", ["verify.seeds=3"], quick=True).verify.seeds == 3
    assert demos.study("text", [], quick=True).verify.seeds == 2


def test_every_method_of_text_is_an_arm_of_the_demo_or_says_why_not():
    # Those that are no arms: they train for long, are of few weights, need a file, a model or vectors, or have a twin.
    aside = {
        "metagrad", "mgd", "datamodel", "source", "tuned", "relatif", "self_influence", "self_trak", "ask_llm",
        "memorization", "verdict", "less", "semdedup", "prototypes",
    }  # fmt: skip
    used = set()
    for arm in demos.study("text", [], every=True).arms:
        used |= {arm.name, str(arm.method if isinstance(arm.method, str) else arm.method["name"])}
    assert set(listed(KINDS["scorer"])) - aside <= used | {"random"}


def test_flags_of_the_text_demo_are_refused_for_the_other():
    with pytest.raises(InputError, match="--every goes with the text demo only"):
        demos.study("digits", [], every=True)
    with pytest.raises(InputError, match="--target goes with the text demo only"):
        demos.study("digits", [], target="docs")
