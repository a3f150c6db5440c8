"""A text encoder: how alike an answer and its references are in meaning, as a model sees it."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.extra import RewardError
from rewards.references import answered, references_of
from rlmed.core.types import Completion, Example

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

KEY = "reward.embedding.model"
READ = (".json", ".safetensors", ".bin", ".txt", ".model")
"""Endings of the files that a model is made of."""
MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that are understood; Normalize changes no cosine."""
LONGEST = 512
"""Tokens of a text that are read, if neither the model nor its tokenizer has a limit."""
_NO_LIMIT = 10**6
"""From here on, a tokenizer's limit means none."""


class Embedder:
    """Compares answers with references by a model that is loaded with the first call.

    Its texts' vectors are means over the tokens, or those of the first token where the folder says
    so as sentence-transformers write it (`modules.json`, `1_Pooling/config.json`).
    """

    def __init__(self, folder: str, *, batch_size: int, device: str, key: str = f"{KEY}=") -> None:
        """Read the folder's settings and the digest of its files.

        Args:
            folder: with the model.
            batch_size: most texts of a pass.
            device: where it computes.
            key: what stands before the folder where a user set it, for errors.

        Raises:
            ValueError: for a folder that is missing, holds no text encoder, or wants what is
                unknown here.
        """
        self._named, self._folder = f"{key}{folder}", Path(folder)
        self._batch_size, self._device = batch_size, device
        if not self._folder.is_dir():
            raise ValueError(
                f"{self._named}: no such folder; give a local folder of a text encoder (hf download NAME "
                "--local-dir FOLDER)"
            )
        self._transformer, self._pooling = self._read_modules()
        if not (self._transformer / "config.json").is_file():
            raise ValueError(f"{self._named}: there is no config.json in {self._transformer}: copy the whole model")
        self._check_encoder()
        own = self._transformer / "sentence_bert_config.json"
        self._limits: dict[str, Any] = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
        self.settings = {"files": _digest(self._folder)}
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any, int] | None = None
        self._said_cut = False

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[float]:
        """Return each answer's cosine with the nearest reference, 0 for a negative one.

        Raises:
            RewardError: if the model cannot be loaded.
        """
        texts = [answered(*pair) for pair in zip(examples, completions, strict=True)]
        return self.compare(texts, [references_of(example) for example in examples])

    def compare(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return each answer's cosine with the nearest of its references, 0 for a negative one.

        Raises:
            RewardError: if the model cannot be loaded.
        """
        texts = list(dict.fromkeys([*answers, *(text for some in references for text in some)]))
        rows = {text: row for row, text in enumerate(texts)}
        vectors = self.embed(texts)
        cosines = (
            vectors[[rows[text] for text in some]] @ vectors[rows[answer]]
            for answer, some in zip(answers, references, strict=True)
        )
        return [float(near.amax().clamp(0.0, 1.0)) for near in cosines]

    def load(self) -> None:
        """Load the model now; raise RewardError if that fails."""
        self._load()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return vectors of length 1, float32 [N, D], on the CPU."""
        import torch

        tokenizer, model, longest = self._load()
        texts = [text.lower() for text in texts] if self._limits.get("do_lower_case") else list(texts)
        vectors = []
        size = self._batch_size
        self._say_cut(tokenizer, texts, longest)
        for start in range(0, len(texts), size):
            inputs = tokenizer(
                texts[start : start + size], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(model.device)
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state
            if self._pooling == "cls":
                vectors.append(states[:, 0])
            else:
                mask = inputs["attention_mask"][:, :, None].to(states.dtype)
                vectors.append((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9))
        return torch.nn.functional.normalize(torch.cat(vectors).float(), dim=1).cpu()

    def _load(self) -> tuple[Any, Any, int]:
        """Return tokenizer, model and the most tokens of a text."""
        with self._lock:
            if self._loaded is None:
                try:
                    self._loaded = self._from_folder()
                except Exception as error:  # the libraries raise anything for a damaged folder
                    why = " ".join(str(error).split())
                    raise RewardError(
                        f"{self._named} cannot be loaded on device {self._device}: {type(error).__name__}: {why}"
                    ) from error
            return self._loaded

    def _from_folder(self) -> tuple[Any, Any, int]:
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self._transformer, local_files_only=True)
        tokenizer.padding_side = "right"  # so that the first token is the text's
        model: Any = AutoModel.from_pretrained(self._transformer, local_files_only=True, dtype=torch.float32)
        limits = (
            self._limits.get("max_seq_length"),
            tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None,
            vars(model.config).get("max_position_embeddings"),
            _positions(model),
        )
        longest = min((int(limit) for limit in limits if limit), default=LONGEST)
        return tokenizer, model.eval().to(self._device), longest

    def _say_cut(self, tokenizer: Any, texts: Sequence[str], longest: int) -> None:
        """Warn of the first text that the encoder cannot read to its end."""
        if self._said_cut:
            return
        tokens = max(len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"])
        if tokens > longest:
            self._said_cut = True
            log.warning(
                "embedding: an answer or reference has %d tokens, and %s reads %d: of longer texts only the beginning "
                "counts",
                tokens,
                self._folder,
                longest,
            )

    def _check_encoder(self) -> None:
        """Refuse a model that writes text, or sees pictures: it has no vector of a whole text."""
        from transformers.models.auto import modeling_auto as known

        config = json.loads((self._transformer / "config.json").read_text(encoding="utf-8"))
        kind = str(config.get("model_type"))
        writers = {*known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
        writers |= {*known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
        writes = kind in writers - {*known.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
        if writes or any(config.get(key) for key in ("is_decoder", "is_encoder_decoder", "vision_config")):
            names = ", ".join(config.get("architectures") or [kind])
            raise ValueError(
                f"{self._named}: it holds {names} (model_type {kind}), which is no text encoder: give a folder of "
                "one that reads a whole text at once, such as BERT, RoBERTa or a model of sentence-transformers"
            )

    def _read_modules(self) -> tuple[Path, str]:
        """Return the transformer's folder and "mean" or "cls"."""
        listed, transformer, pooling = self._folder / "modules.json", self._folder, self._folder / "1_Pooling"
        if listed.is_file():
            for module in json.loads(listed.read_text(encoding="utf-8")):
                kind, path = str(module["type"]).rpartition(".")[2], self._folder / str(module["path"])
                if kind not in MODULES:
                    raise ValueError(
                        f"{self._named}: its module {kind} is not understood, only {', '.join(MODULES)}: choose "
                        "another encoder"
                    )
                transformer, pooling = (
                    path if kind == "Transformer" else transformer,
                    path if kind == "Pooling" else pooling,
                )
        settings = pooling / "config.json"
        if pooling == self._folder or not settings.is_file():
            return transformer, "mean"
        return transformer, self._pooling_of(json.loads(settings.read_text(encoding="utf-8")))

    def _pooling_of(self, settings: dict[str, Any]) -> str:
        """Return how token vectors are pooled, as either format of the settings says it."""
        names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        chosen = [
            names.get(key, key) for key, value in settings.items() if key.startswith("pooling_mode_") and value is True
        ]
        if "pooling_mode" in settings:
            chosen = [str(settings["pooling_mode"])]
        if chosen not in (["mean"], ["cls"]):
            raise ValueError(
                f"{self._named}: it pools tokens by {' and '.join(chosen) or 'nothing'}; mean and cls are "
                "understood: choose another encoder"
            )
        return chosen[0]


def _positions(model: Any) -> int | None:
    """Return the positions that a text can have, where they are numbered after padding's.

    RoBERTa and its kin count from `padding_idx + 1` on, so their longest text is shorter than
    `max_position_embeddings`. None where all positions are for texts.
    """
    counts = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(counts, default=None)


def _digest(folder: Path) -> str:
    """Return a SHA-256 of a model's files: other weights are another reward."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in READ and path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
