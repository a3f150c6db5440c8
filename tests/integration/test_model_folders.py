"""Model folders that contradict themselves, in commands: one line and exit status 2, or right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rewards.likelihood_gain import option_logprobs
from rlmed import ask, evaluate, sft, sft_run
from rlmed.cluster.engines import open_model
from rlmed.core.config.schema import RunConfig
from rlmed.core.parsing import has_format
from rlmed.data.loading import load_run_data
from rlmed.data.prompts import PromptRenderer
from rlmed.evaluation.option_likelihood import letter_probabilities
from rlmed.models.policy import load_policy
from rlmed.run import Run
from tests.rounding import LOGPROBS
from tests.unit.rlmed.data.pictures import marked

pytestmark = pytest.mark.slow

Config = Callable[..., RunConfig]
RAISING = "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"


def prefill(folder: Path, text: str) -> None:
    path = folder / "chat_template.jinja"
    template = path.read_text()
    assert "'<|im_start|>assistant\\n'" in template
    path.write_text(template.replace("'<|im_start|>assistant\\n'", f"'<|im_start|>assistant\\n{text}'"))


def arguments(folder: Path, tmp_path: Path) -> list[str]:
    marked(90, (112, 112)).save(tmp_path / "picture.png")
    question = [str(tmp_path / "picture.png"), "Which body part is shown?"]
    return [*question, "--options", "head", "chest", "knee", "--model", str(folder), "--max-tokens", "64"]


def raises(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(RAISING + path.read_text())


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Qwen/x"}))


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


@pytest.mark.parametrize("spoil", [raises, adapter, quantized, cut])
def test_every_command_refuses_in_one_line(
    spoil: Callable[[Path], None],
    base_copy: Path,
    make_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(base_copy)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ask.main(arguments(base_copy, tmp_path))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{re.escape(str(base_copy))}.*\n", error)
    config = make_config(f"model.path={base_copy}")
    for command in (Run, sft.main, evaluate.main):
        with pytest.raises(ValueError, match=re.escape(error.removeprefix("error: ").strip())):
            command(config, tmp_path / "run")


def test_a_template_that_has_written_the_tag_costs_no_format(
    base_copy: Path, make_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefill(base_copy, "<think>")
    ask.main(arguments(base_copy, tmp_path))
    shown = capsys.readouterr().out
    assert re.search(r"reasoning  \w", shown)
    assert re.search(r"answer     [ABC]\) ", shown)
    config = make_config(
        f"model.path={base_copy}", "rollout.max_tokens=64", "eval.max_tokens=64", "eval.at_start=false", "steps=1"
    )
    Run(config, tmp_path / "run").execute()
    (metrics,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics["reward/format"] > 0.5
    summary = json.loads((tmp_path / "run/evaluations/step-000001/summary.json").read_text())
    assert summary["files"][0]["format_rate"] > 0.5
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    texts = [entry["text"] for group in groups for entry in group["completions"]]
    assert all(entry.startswith("<think>") for entry in texts)
    assert all(
        entry["reward_parts"]["format"] == has_format(entry["text"])
        for group in groups
        for entry in group["completions"]
    )


@pytest.mark.parametrize("text", ["", "<think>\\n", "<think>\\n\\n</think>\\n\\n"])
def test_written_texts_are_scored_and_learnt_as_they_would_be_sampled(
    text: str, base_copy: Path, make_config: Config
) -> None:
    prefill(base_copy, text)
    renderer = PromptRenderer(*open_model(base_copy), max_prompt_tokens=256)
    config = make_config(f"model.path={base_copy}", "sft.target=option", "sft.batch_size=1")
    examples = load_run_data(config.data, config.prompt, renderer, training=True).train_examples
    (item,) = sft_run.Batches(examples, renderer, config).batch(0)
    prompt, written = item.prompt, item.sequences[0].completion.token_ids
    assert prompt.prefill == text.replace("\\n", "\n")
    asked: list[str] = []

    def whole(token_ids: np.ndarray) -> str:
        return str(renderer.tokenizer.decode(np.concatenate([prompt.token_ids, token_ids]))).rpartition("assistant\n")[
            2
        ]

    assert re.fullmatch(
        r"(<think>\s*</think>\s*)?<think>\s*b \(B\)\.</think>\n<answer>B</answer><\|im_end\|>", whole(written)
    )

    def likelihood(questions):
        asked.extend(whole(row) for _, rows in questions for row in rows)
        return [[np.zeros(len(row), np.float32) for row in rows] for _, rows in questions]

    option_logprobs(prompt, ["dark", ""], likelihood, renderer.split_common_prefix)
    pattern = r"(<think>\s*</think>\s*)?<think>\s*dark</think>\n<answer>A"
    assert re.fullmatch(pattern, asked[0])
    assert re.fullmatch(r"<think>\s*</think>\s*<answer>A", asked[3])
    policy = load_policy(base_copy)
    cases = [(prompt, "<answer>"), (prompt, prompt.prefill + "<answer>")]
    (one, other) = letter_probabilities(cases, policy=policy, renderer=renderer, token_budget=1000)
    assert one.sum() == pytest.approx(1)
    if text != "<think>\\n":  # an answer inside an open reasoning is another text
        np.testing.assert_allclose(one, other, atol=LOGPROBS)


def test_a_model_whose_files_name_different_ends_stops_at_each(
    base_copy: Path, make_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (base_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 734, "pad_token_id": 734}))
    config = make_config(
        f"model.path={base_copy}",
        "rollout.max_tokens=64",
        "eval.max_tokens=64",
        "sft.epochs=0.5",
        "eval.controls=false",
    )
    sft.main(config, tmp_path / "run")
    assert "has conflicting end tokens" in caplog.text
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((last / "generation_config.json").read_text())["eos_token_id"] == [734, 736]
    for summary in (tmp_path / "run" / "evaluations").glob("*/summary.json"):
        assert json.loads(summary.read_text())["files"][0]["cut_by_length"] < 0.5
    caplog.clear()
    open_model(last)
    assert caplog.text == ""
