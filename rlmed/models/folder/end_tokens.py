"""Find the tokens that end a completion, from every source in a model folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from rlmed.core.chat import TEMPLATE_FILE, has_tokenizer, load_tokenizer, turn_end
from rlmed.core.files.damage import read_json
from rlmed.core.process.foreign import foreign
from rlmed.models.folder.contents import CONFIG_FILE

TOKENIZER_CONFIG, TOKENS_MAP, GENERATION_CONFIG = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """End tokens of a model folder by source.

    Example:
        >>> EndTokens({"generation_config.json": (151643,), "tokenizer_config.json": (151645,)}).ids
        (151643, 151645)
    """

    sources: dict[str, tuple[int, ...]]

    @property
    def ids(self) -> tuple[int, ...]:
        """All end tokens: any source's token ends a completion."""
        return tuple(sorted({token_id for ids in self.sources.values() for token_id in ids}))

    def doubts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return warnings: end tokens absent in generation_config.json, or that are plain words."""

        def shown(ids: Iterable[int]) -> str:
            return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids) or "none"

        model, (generation, *others) = f"model {tokenizer.name_or_path!r}", self.sources.values()
        lines = []
        if not {i for ids in others for i in ids} <= set(generation):
            named = "; ".join(f"{source}: {shown(ids)}" for source, ids in self.sources.items())
            lines.append(f"{model} has conflicting end tokens ({named}): each of them ends a completion")
        if words := [i for i in self.ids if i not in tokenizer.added_tokens_decoder]:
            sources = ", ".join(source for source, ids in self.sources.items() if set(words) & set(ids))
            lines.append(
                f"{model}: {sources} says that completions end with {shown(words)}, not a control token of the tokenizer: "
                "correct it if it belongs to another model"
            )
        return lines


def find_end_tokens(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> EndTokens:
    """Collect the end tokens of generation_config.json, tokenizer files and the chat template.

    Args:
        folder: model folder or hub name.
        config: the model's.
        tokenizer: the folder's; None loads it, if there is one.

    Raises:
        ValueError: if a source names an id that the model does not have, or no source names any.
    """
    with foreign(f"{Path(folder) / GENERATION_CONFIG} cannot be read", "Correct it, or remove it"):
        try:
            source, named = GENERATION_CONFIG, GenerationConfig.from_pretrained(folder).eos_token_id
        except OSError:  # without the file, transformers uses the model's configuration
            source, named = CONFIG_FILE, GenerationConfig.from_model_config(config).eos_token_id
    sources = {source: _checked(folder, source, named, config)}
    if tokenizer is None and (has_tokenizer(folder) or not Path(folder).is_dir()):
        tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        for source, text in _tokenizer_ends(Path(folder), tokenizer).items():
            sources[source] = _checked(folder, source, tokenizer.convert_tokens_to_ids(text), config)
    ends = EndTokens(sources)
    if not ends.ids:
        raise ValueError(
            f"model {str(folder)!r}: {GENERATION_CONFIG} names no eos_token_id and the tokenizer no eos_token: completions "
            "would never end; set one"
        )
    return ends


def _tokenizer_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's and template's end tokens by source."""
    ends = {TOKENIZER_CONFIG: tokenizer.eos_token, TEMPLATE_FILE: turn_end(tokenizer)}
    for source in (TOKENIZER_CONFIG, TOKENS_MAP):  # transformers keeps only one of these two
        if (folder / source).is_file():
            said = read_json(folder / source).get("eos_token")
            ends[source] = said.get("content") if isinstance(said, dict) else said or ends.get(source)
    vocabulary = tokenizer.get_vocab()
    return {source: text for source, text in ends.items() if isinstance(text, str) and text in vocabulary}


def _checked(folder: Path, source: str, named: object, config: PreTrainedConfig) -> tuple[int, ...]:
    ids = tuple(named) if isinstance(named, (list, tuple)) else () if named is None else (named,)
    size = config.get_text_config().vocab_size
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < size:
            raise ValueError(
                f"{Path(folder) / source}: the end token {token_id!r} is outside the model's token ids (0 to {size - 1}): "
                "correct it"
            )
    return ids
