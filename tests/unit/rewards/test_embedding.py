"""Answers and references compared by a text encoder, beside transformers and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    RobertaConfig,
    RobertaModel,
    T5Config,
)

from rewards.cache import RewardCache
from rewards.extra import RewardError
from rewards.rubric import Rubric
from rewards.slow_parts import SlowRewards
from rlmed.core.config.composing import compose_config
from rlmed.core.types import Example
from tests.rounding import rounding
from tests.unit.rewards.groups import EXAMPLE, group_of

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *("the", "a", "cyst", "mass", "in", "of", "liver", "kidney", "left", "right", "head", "chest", "no", "finding"),
)
HIDDEN = 16
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
}
CLOSE = rounding(1000)
"""Two layers of sums over 16 and 32 entries, with a normalised result."""
OPEN = Example(
    id="x", image=None, question="What?", task="open", truth={"answers": ["a cyst", "mass in the left kidney"]}
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder whose tokens differ much."""
    folder = tmp_path_factory.mktemp("bert")
    save_tokenizer(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, max_position_embeddings=16)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture
def make_rubric(request: pytest.FixtureRequest) -> Callable[..., Rubric]:
    def make(folder: Path, *settings: str, path: Path | None = None) -> Rubric:
        config = compose_config(
            "train", ["reward=embedding", f"reward.embedding.model={folder}", "reward.slow.wait_s=0.001", *settings]
        ).reward
        slow = SlowRewards(config.slow, config.judge, RewardCache(path), embedded_by=config.embedding)
        rubric = Rubric.from_config(config.weights, slow=slow)
        request.addfinalizer(rubric.close)
        return rubric

    return make


def answers(*texts: str) -> list[str]:
    return [f"<think>x</think><answer>{text}</answer>" for text in texts]


def scores(rubric: Rubric, texts: Sequence[str], example: Example, index: int = 0) -> list[float]:
    return [float(value) for value in rubric.score(group_of(texts, index, example)).reward_parts["embedding"]]


def by_hand(folder: Path, text: str, *, first: bool = False, longest: int = 16) -> torch.Tensor:
    """A text's vector, alone and so without padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]
    vector = states[0] if first else states.sum(0) / len(states)
    return vector / vector.norm()


def nearest(folder: Path, text: str, references: Sequence[str], **how: Any) -> float:
    vector = by_hand(folder, text, **how)
    cosines = [float(vector @ by_hand(folder, reference, **how)) for reference in references]
    return min(max(*cosines, 0.0), 1.0)


def test_it_is_the_cosine_with_the_nearest_reference(bert: Path, make_rubric: Callable[..., Rubric]) -> None:
    said = ["a cyst", "mass in the left kidney", "no finding", "the right liver of a chest"]
    found = scores(make_rubric(bert, "reward.embedding.batch_size=3"), [*answers(*said), "no tags"], OPEN)
    assert found[:2] == pytest.approx([1.0, 1.0], abs=CLOSE)
    assert found[:4] == pytest.approx([nearest(bert, text, OPEN.truth["answers"]) for text in said], abs=CLOSE)
    assert min(found[2:4]) < 0.95
    assert found[4] == 0.0


def test_a_letter_stands_for_its_option(bert: Path, make_rubric: Callable[..., Rubric]) -> None:
    found = scores(make_rubric(bert), answers("B", "(a)", "chest", "Z"), EXAMPLE)
    expected = [1.0, nearest(bert, "head", ["chest"]), 1.0, nearest(bert, "Z", ["chest"])]
    assert found == pytest.approx(expected, abs=CLOSE)


def sentence_transformer(
    source: Path, folder: Path, pooling: dict[str, Any], *, inner: str = "", **limits: Any
) -> Path:
    """The same model in the layout of sentence-transformers."""
    shutil.copytree(source, folder / inner)
    modules = [("Transformer", inner), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **pooling}))
    (folder / inner / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder


@pytest.mark.parametrize(
    ("pooling", "inner"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, ""),
        ({"pooling_mode": "cls"}, "0_Transformer"),
    ],
)
def test_the_folder_says_how_to_pool_and_how_much_to_read(
    pooling: dict[str, Any], inner: str, bert: Path, tmp_path: Path, make_rubric: Callable[..., Rubric]
) -> None:
    folder = sentence_transformer(bert, tmp_path / "st", pooling, inner=inner, max_seq_length=5, do_lower_case=True)
    said = ["No Finding", "mass in the left kidney"]
    expected = [nearest(bert, text.lower(), OPEN.truth["answers"], first=True, longest=5) for text in said]
    assert scores(make_rubric(folder), answers(*said), OPEN) == pytest.approx(expected, abs=CLOSE)


def test_other_weights_are_another_reward(bert: Path, tmp_path: Path, make_rubric: Callable[..., Rubric]) -> None:
    """And the same ones elsewhere are not."""
    path, copied, other = tmp_path / "rewards.jsonl", tmp_path / "copied", tmp_path / "other"
    shutil.copytree(bert, copied)
    shutil.copytree(bert, other)
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight += 0.5
    model.save_pretrained(other)
    texts, calls = answers("no finding"), []
    for index, folder in enumerate((bert, copied, other)):
        scores(make_rubric(folder, path=path), texts, OPEN, index)
        calls.append(RewardCache(path).spent("embedding")[0])
    assert calls == [1, 1, 2]


def test_what_cannot_be_is_refused_before_anything_is_sampled(
    bert: Path, tmp_path: Path, make_rubric: Callable[..., Rubric]
) -> None:
    with pytest.raises(ValueError, match=r"/nowhere: no such folder"):
        make_rubric(Path("/nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json in .*empty"):
        make_rubric(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"set reward\.embedding\.model"):
        Rubric.from_config({"embedding": 1.0})
    with pytest.raises(ValueError, match=r"reward\.weights has no embedding"):
        make_rubric(bert, "~reward.weights.embedding")
    folder = sentence_transformer(bert, tmp_path / "st", {"pooling_mode_max_tokens": True})
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        make_rubric(folder)
    modules = folder / "modules.json"
    modules.write_text(modules.read_text().replace("models.Normalize", "models.Dense"))
    with pytest.raises(ValueError, match="Dense"):
        make_rubric(folder)
    boxes = Example(id="box-1", image=None, question="Where?", task="grounding", truth={"boxes": [], "frame": [9, 9]})
    with pytest.raises(ValueError, match="'box-1' of task grounding"):
        make_rubric(bert).check_tasks([OPEN, boxes])


def test_a_damaged_model_stops_the_run_at_once(bert: Path, tmp_path: Path, make_rubric: Callable[..., Rubric]) -> None:
    shutil.copytree(bert, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    rubric = make_rubric(tmp_path / "cut", "reward.embedding.on_failure=missing", "reward.embedding.retries=5")
    with pytest.raises(RewardError, match=r"embedding\.model=.*/cut cannot be loaded"):
        scores(rubric, answers("a cyst"), OPEN)


def test_a_text_has_as_many_positions_as_are_left_after_padding_s(
    tmp_path: Path, make_rubric: Callable[..., Rubric], caplog: pytest.LogCaptureFixture
) -> None:
    """RoBERTa numbers them from `padding_idx + 1` on: of 16, texts have 14."""
    save_tokenizer(tmp_path)
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=16, pad_token_id=1)).save_pretrained(tmp_path)
    rubric = make_rubric(tmp_path)
    longest, longer = " ".join(["liver", "mass"] * 6), " ".join(["liver", "mass"] * 30)
    found = scores(rubric, answers(longest, longer, longest + " head"), OPEN)
    truths = OPEN.truth["answers"]
    expected = [nearest(tmp_path, text, truths, longest=14) for text in (longest, longer, longest)]
    assert found == pytest.approx(expected, abs=CLOSE)
    scores(rubric, answers(longer + " chest"), OPEN, 1)
    said = [entry.getMessage() for entry in caplog.records if "only the beginning" in entry.getMessage()]
    assert len(said) == 1
    assert f"has 62 tokens, and {tmp_path} reads 14" in said[0]


def test_models_that_write_or_see_are_refused(tmp_path: Path, bert: Path, make_rubric: Callable[..., Rubric]) -> None:
    for name, config in {
        "LlamaForCausalLM": LlamaConfig(**SIZES),
        "Qwen2VLForConditionalGeneration": Qwen2VLConfig(),
        "BertLMHeadModel": BertConfig(**SIZES, is_decoder=True),
        "T5ForConditionalGeneration": T5Config(),
        "CLIPModel": CLIPConfig(),
    }.items():
        config.architectures = [name]
        config.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=rf"embedding\.model={tmp_path / name}: it holds {name} .*BERT"):
            make_rubric(tmp_path / name)
    # a head that is not read changes nothing
    shutil.copytree(bert, tmp_path / "masked")
    BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=16)).save_pretrained(tmp_path / "masked")
    make_rubric(tmp_path / "masked")
