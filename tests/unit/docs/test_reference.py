"""The generated page of keys: what stands in conf/ and in the schema, in the right row."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from rlmed.core.config.use import schema_keys
from tests.root import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(reference: ModuleType) -> dict[str, list[str]]:
    """Cells by key."""
    lines = [line for line in reference.configuration().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].partition("`{")[0].strip("`"): row[1:] for row in cells}


def test_every_key_has_a_row(rows: dict[str, list[str]]) -> None:
    assert set(schema_keys()) - {"reward.weights"} <= set(rows)


@pytest.mark.parametrize(
    ("key", "kind", "default", "text"),
    [
        ("algo.group_size", "integer", "`4`", "Completions per prompt."),
        ("learner.lr", "number", "`1e-06`", "Peak learning rate."),
        ("learner.freeze", "list of `vision`, `merger`, `language_model`", "`[]`", "Parts to freeze: vision"),
        ("data.leakage", "`report`, `strict`, `off`", "`report`", "Training pictures and rows"),
        ("data.mix", "{name: number} or null", "`null`", "Share of each modality"),
        ("checkpoint.keep_last", "integer", "`2`", "Checkpoints kept."),
        ("reward.weights.choice", "number", "`1`", "The correct letter; half"),
        ("reward.weights.brevity", "number", "`0`", "Guard: 1 up to 120 words"),
        ("prompt.template", "string", "`{question}…`", "Text of the user turn"),
    ],
)
def test_a_row_says_type_default_and_meaning(
    rows: dict[str, list[str]], key: str, kind: str, default: str, text: str
) -> None:
    assert rows[key][:2] == [kind, default]
    assert rows[key][2].startswith(text)


def test_choices_of_the_loss_are_those_it_accepts(rows: dict[str, list[str]]) -> None:
    (clip,) = [row for key, row in rows.items() if key.endswith(".clip")]
    assert clip[0] == "`ppo`, `dual`, `cispo`, `none`"


def test_a_key_without_comment_is_an_error(reference: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"algo\.unheard has no comment"):
        reference.explained("algo.unheard")


def test_settings_in_a_comment_become_code_and_tags_are_shown(reference: ModuleType) -> None:
    written = reference._prose("Two commands: python -m rlmed.sft +experiment=x data.train=A.jsonl, then another")
    assert written == "Two commands: `python -m rlmed.sft +experiment=x data.train=A.jsonl`, then another"
    written = reference._prose("Needs kl_coef, not 0.5; `x|y=z`; use reward=answer_only: <think> a|b")
    assert written == "Needs `kl_coef`, not 0.5; `x|y=z`; use `reward=answer_only`: &lt;think> a\\|b"
