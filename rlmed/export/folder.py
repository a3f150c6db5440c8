"""Write the exported folder: weights, settings, tokenizer, image processor, chat template."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from rlmed.cluster.engines import recorded_renderer
from rlmed.core.chat import TEMPLATE_FILE
from rlmed.core.files.atomic import partial_folder, refusal, rename_into_place
from rlmed.core.files.damage import read_json
from rlmed.core.files.ownership import remove
from rlmed.core.process.display import one_line
from rlmed.data.prompts import PromptRenderer
from rlmed.export.source import Source
from rlmed.export.template import CHOICE, with_training_prompt
from rlmed.models.folder.adapter import is_adapter
from rlmed.models.folder.weight_files import stored_dtype
from rlmed.models.policy import DTYPES, Policy, load_config, load_policy

SHARD = "5GB"
"""Largest weight file."""
OF_THIS_MACHINE = ("_name_or_path", "_model_name_or_path", "name_or_path", "is_local", "local_files_only")
"""Keys of small files that say where a model was loaded from, not what it is."""
SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
"""Errors that libraries name in words of their own."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an exported folder holds, for those who write about it."""

    dtype: str
    parameters: int
    end_tokens: tuple[str, ...]
    suppressed: tuple[int, ...]
    """Tokens that stand for images: never sampled in training."""
    renderer: PromptRenderer
    """Of the checkpoint."""
    max_new_tokens: int | None
    tasks: tuple[str, ...] = (CHOICE,)
    """Tasks that the model answers; the chat template has the prompt of a single one."""

    @property
    def wrapped(self) -> bool:
        """Whether the chat template has the prompt of training."""
        return len(self.tasks) == 1


def check_target(out: Path) -> None:
    """Check that a folder can be written there.

    Raises:
        ValueError: if something is there.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(f"--out {out} is a broken link to {out.readlink()}: remove it, or choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose another name")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: choose a new folder, or remove it first")


def exported_dtype(checkpoint: Path) -> str:
    """Return the dtype in which the weights were trained, a key of `DTYPES`.

    That of a base that was trained in another one would round the answers.
    """
    config = load_config(checkpoint)
    dtype = config.dtype if is_adapter(checkpoint) else stored_dtype(checkpoint) or config.dtype
    return next((name for name, found in DTYPES.items() if found == dtype), "float32")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder, which becomes `out` if nothing goes wrong.

    Raises:
        OSError: if it cannot be written; names `out` and what to do.
    """
    out = out.absolute()
    advice = "export again"
    try:
        aside = partial_folder(out)
    except OSError as error:
        raise refusal(out, error, advice=advice) from error
    try:
        yield aside
        _sync(aside)
        if not rename_into_place(aside, out, may_replace=lambda: False):
            raise ValueError(f"--out {out} is not empty any more: choose a new folder")
    except ValueError:
        raise
    except OSError as error:
        raise refusal(out, error, advice=advice) from error
    except Exception as error:  # safetensors, tokenizers and others name a full disk in types of their own
        number = next((number for number in SYSTEM if os.strerror(number) in str(error)), None)
        if number is None:
            raise
        raise refusal(out, OSError(number, one_line(error)), advice=advice) from error
    finally:
        remove(aside)


def write_folder(folder: Path, source: Source, dtype: str, tasks: tuple[str, ...] = (CHOICE,)) -> Exported:
    """Write all but the card into an empty folder; adapters are merged in float32.

    `tasks` are those that the model answers.

    Raises:
        ValueError: if the checkpoint cannot be used, or the disk has no room.
    """
    checkpoint = source.checkpoint
    renderer = recorded_renderer(checkpoint)
    template = with_training_prompt(renderer, tasks[0] if len(tasks) == 1 else None)
    policy: Policy = load_policy(checkpoint, dtype=dtype)
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"the weights need {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on the disk of {folder.parent}: "
            "free some space and export again"
        )
    limit = _longest_answer(source)
    generation = _generation(policy, renderer, limit)
    policy.model.generation_config = generation
    policy.model.save_pretrained(folder, max_shard_size=SHARD)
    generation.save_pretrained(folder)
    _write_tokenizer(folder, renderer, template)
    for path in folder.glob("*config.json"):
        _settle(path)
    return Exported(
        dtype=dtype,
        parameters=sum(parameter.numel() for parameter in policy.model.parameters()),
        end_tokens=tuple(str(token) for token in renderer.tokenizer.convert_ids_to_tokens(_ends(policy))),
        suppressed=policy.banned_token_ids,
        renderer=renderer,
        max_new_tokens=limit,
        tasks=tasks,
    )


def _longest_answer(source: Source) -> int | None:
    found = (source.config.get("eval") or {}).get("max_tokens")
    return int(found) if isinstance(found, int) else None


def _ends(policy: Policy) -> list[int]:
    return sorted(policy.end_token_ids)


def _generation(policy: Policy, renderer: PromptRenderer, limit: int | None) -> GenerationConfig:
    """Return settings that answer as evaluation did; nothing comes from the base model's."""
    before, tokenizer = policy.model.generation_config, renderer.tokenizer
    padding = [before.pad_token_id, tokenizer.pad_token_id, *_ends(policy)]
    return GenerationConfig(
        do_sample=False,
        bos_token_id=before.bos_token_id,
        eos_token_id=_ends(policy),
        pad_token_id=next(token for token in padding if token is not None),
        suppress_tokens=list(policy.banned_token_ids) or None,
        max_new_tokens=limit,
    )


def _write_tokenizer(folder: Path, renderer: PromptRenderer, template: str) -> None:
    own = renderer.tokenizer.chat_template
    try:
        renderer.tokenizer.chat_template = template
        renderer.save(folder)
    finally:
        renderer.tokenizer.chat_template = own
    assert (folder / TEMPLATE_FILE).read_text(encoding="utf-8") == template


def _settle(path: Path) -> None:
    """Remove what a small file says of the machine that wrote it."""
    path.write_text(json.dumps(_settled(read_json(path)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _settled(inner) for key, inner in value.items() if key not in OF_THIS_MACHINE}
    return [_settled(inner) for inner in value] if isinstance(value, list) else value


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
