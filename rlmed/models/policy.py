"""The policy: a transformers model with what sampling and learning need of it. Engine and learner run the same modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlmed.core.damage import read_json
from rlmed.core.foreign import foreign
from rlmed.core.near_paths import near_path
from rlmed.core.types import Prompt
from rlmed.models.attention import ATTENTION_NAME, AttentionLayout
from rlmed.models.end_tokens import find_end_tokens
from rlmed.models.families import family_of, unsampleable_token_ids
from rlmed.models.folder import CONFIG_FILE, check_folder
from rlmed.models.fused import use_fused_layers
from rlmed.models.linear import use_fast_linears
from rlmed.models.logprobs import chunked_logprobs, frozen_logprobs, masked_logits
from rlmed.models.logs import quiet_loading
from rlmed.models.products import settle_products
from rlmed.models.weight_files import HEAD, check_weight_files, own_head_differs

COMPUTED_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""In the weight files of older versions; models compute them."""
MODEL_FOLDERS = frozenset(("model", "models", "checkpoints", "weights", "llm", "llms", "hf"))
"""What people call the folder that they keep models in."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy:
    """A model whose decoder runs on packed rows under a layout.

    Example:
        >>> policy = load_policy(Path("outputs/run/checkpoints/step-300"))          # doctest: +SKIP
        >>> hidden = policy.hidden(token_ids, positions, layout, image_inputs)     # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model that was loaded with the shared-prefix attention (see `load_policy`)."""
        self.model = model.eval()  # no supported family has dropout; eval also keeps transformers from warning
        self.family = family_of(model.config)
        projection = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear) or projection.bias is not None:
            raise ValueError(
                f"{model.config.model_type}: the vocabulary projection must be a linear layer without bias"
            )
        self.projection = projection
        self.banned_token_ids = unsampleable_token_ids(model.config)
        self._banned = torch.tensor(self.banned_token_ids, dtype=torch.int64, device=self.device)
        ends = model.generation_config.eos_token_id
        self.end_token_ids: frozenset[int] = frozenset([ends] if isinstance(ends, int) else ends or ())
        if not self.end_token_ids:
            raise ValueError(
                "the model folder's generation_config.json names no eos_token_id: completions could not end"
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.projection.weight.dtype

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(decoder layers, key-value heads, head width): the geometry of a key-value cache."""
        config = self.model.config.get_text_config()
        width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, width

    def freeze(self, parts: Collection[str]) -> None:
        """Exclude the named parts (see `rlmed.models.families.PARTS`) from training, and include all others."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.family.part_of(name) not in parts)

    def image_inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """A prompt's image tensors on the policy's device; empty for text."""
        return {name: torch.as_tensor(array).to(self.device) for name, array in prompt.image_inputs.items()}

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """int64 [R, P] rotary positions of a prompt on the CPU: R is 3 for M-RoPE families and 1 for text families.

        Completion token t of the prompt stands at `positions.max() + 1 + t` in every row.
        """
        grids = {name: torch.as_tensor(array) for name, array in prompt.image_inputs.items() if name != "pixel_values"}
        return self.family.positions(self.model, torch.as_tensor(prompt.token_ids), grids).cpu()

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        layout: AttentionLayout,
        image_inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Final hidden states of a packed row.

        Args:
            token_ids: int64 [N].
            positions: int64 [R, N], see `prompt_positions`.
            layout: who attends to whom.
            image_inputs: forward arguments of all images of the row, in row order.

        Returns:
            [N, d] in the policy's dtype.
        """
        # M-RoPE models take [3, batch, N], text models [batch, N]
        position_ids = positions.unsqueeze(1) if self.family.vision else positions
        output = self.model.base_model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids,
            use_cache=False,
            layout=layout,
            **(image_inputs or {}),
        )
        return output.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [M, V] logits of [M, d] hidden states; -inf where a token cannot be sampled."""
        return masked_logits(hidden, self.projection.weight, self._banned)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies, see `chunked_logprobs`."""
        return chunked_logprobs(hidden, self.projection.weight, targets, temperature=temperature, banned=self._banned)

    def frozen_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the targets alone and without gradient, see `logprobs.frozen_logprobs`."""
        return frozen_logprobs(hidden, self.projection.weight, targets, temperature=temperature, banned=self._banned)


def merge_image_inputs(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the image tensors of several prompts in row order."""
    names = {name: None for entry in inputs for name in entry}
    return {name: torch.cat([entry[name] for entry in inputs if name in entry]) for name in names}


def load_policy(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    onednn: Collection[str] | None = None,
) -> Policy:
    """Load a Hugging Face folder (or hub name) as a policy.

    Args:
        folder: of the model.
        dtype: of the parameters, a key of `DTYPES`.
        device: where they are put.
        onednn: what oneDNN computes in this process from now on, see `rlmed.models.products.settle_products`.

    Raises:
        ValueError: when the folder is no model folder, lacks weights, or its family is not supported.
    """
    config = load_config(folder)
    family = family_of(config)
    auto = AutoModelForImageTextToText if family.vision else AutoModelForCausalLM
    attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"} if family.vision else ATTENTION_NAME
    if Path(folder).is_dir():
        check_weight_files(Path(folder))
    ends = find_end_tokens(folder, config)
    tied = bool(config.tie_word_embeddings)  # transformers changes it where the weights disagree
    with (
        quiet_loading(),
        foreign(
            f"the weights of model {str(folder)!r} cannot be loaded",
            "Copy or download its *.safetensors and config.json again",
        ),
    ):
        model, found = auto.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_loaded(Path(folder), found, tied=tied)
    _settle_generation(model, ends.ids)
    if torch.device(device).type == "cpu":
        settle_products(config, onednn)
        use_fast_linears(model)
    use_fused_layers(model)
    return Policy(model.to(device))


def _check_loaded(folder: Path, found: Mapping[str, Collection[Any]], *, tied: bool) -> None:
    """Weights and config.json are of one model: transformers fills what is absent with random numbers and drops the rest.

    Args:
        folder: where the model is from.
        found: transformers' account of it.
        tied: whether config.json says that token embeddings and vocabulary projection are one.

    Raises:
        ValueError: naming the first parameter that only one of them has.
    """
    cure = "its files do not belong to its config.json; copy or download the folder again"
    if reshaped := sorted(found["mismatched_keys"]):
        name, stored, expected = reshaped[0]
        raise ValueError(
            f"model {str(folder)!r}: {name} is {list(stored)} in the weights and {list(expected)} by config.json "
            f"({len(reshaped)} parameters differ): {cure}"
        )
    if absent := sorted(found["missing_keys"]):
        if absent == [HEAD]:
            cure = (
                "config.json does not say that its token embeddings are the vocabulary projection too: set tie_word_embeddings "
                "to true if they are, else copy or download the folder again"
            )
        raise ValueError(
            f"model {str(folder)!r} has no weights for {len(absent)} parameters of its config.json, the first is {absent[0]}: "
            f"{cure}"
        )
    unknown = sorted(name for name in found["unexpected_keys"] if not name.endswith(COMPUTED_BUFFERS))
    if adapted := [name for name in unknown if "lora_" in name or ".base_layer." in name]:
        raise ValueError(
            f"model {str(folder)!r} holds an adapter that was not merged into its weights ({adapted[0]}): merge it first "
            "(merge_and_unload() of peft) and save the model again"
        )
    if unknown:
        raise ValueError(
            f"model {str(folder)!r} has weights for {len(unknown)} parameters that its config.json knows nothing of, the first "
            f"is {unknown[0]}: {cure}"
        )
    if tied and folder.is_dir() and own_head_differs(folder):
        text = read_json(folder / CONFIG_FILE).get("text_config")
        within = "text_config." if isinstance(text, dict) and text.get("tie_word_embeddings") else ""
        raise ValueError(
            f"model {str(folder)!r}: config.json says {within}tie_word_embeddings=true, and the weights hold an lm_head.weight "
            "that is not the token embeddings: set it to false if it was trained apart, else remove lm_head.weight"
        )


def _settle_generation(model: PreTrainedModel, end_token_ids: tuple[int, ...]) -> None:
    """Let the model's generation settings name every end token, in checkpoints too, and be such that they can be saved.

    Nothing else of them is used. transformers loads contradictory ones with a warning and refuses to save them, which would be
    found out at the first checkpoint.
    """
    settings = model.generation_config
    settings.eos_token_id = list(end_token_ids)
    try:
        settings.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id,
            pad_token_id=settings.pad_token_id,
            eos_token_id=settings.eos_token_id,
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder or hub name.

    Raises:
        ValueError: naming the folder and what is missing.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_folder(folder)
        with foreign(f"{folder / 'config.json'} is damaged or of an unknown kind", "Copy or download it again"):
            return AutoConfig.from_pretrained(folder)
    if folder.is_file():
        raise ValueError(f"model {str(folder)!r} is a file: give the folder that holds it, with its config.json")
    if folder.is_absolute() or len(folder.parts) > 2 or ".." in folder.parts:
        # a hub name is NAME or OWNER/NAME
        cure = near_path(folder) or "check model.path"
        raise ValueError(f"model folder {str(folder)!r} does not exist (relative to {Path.cwd()}); {cure}")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        near = near_path(folder)
        raise ValueError(
            f"model {str(folder)!r} is neither a folder in {Path.cwd()} nor can it be fetched from the hub: "
            f"{str(error).splitlines()[0]} If it is a folder, {near or 'correct the path'}{_to_download(folder)}"
        ) from error


def _to_download(folder: Path) -> str:
    """How to get a model that is neither here nor to be had from the hub, as the end of a sentence.

    A folder of models, as in `models/Qwen2-VL-2B-Instruct`, is nobody on the hub: that name needs its owner.
    """
    name = folder.name
    if len(folder.parts) == 2 and folder.parts[0].lower() in MODEL_FOLDERS:
        owner, which = ("Qwen", "") if name.startswith("Qwen") else ("OWNER", ", OWNER being who publishes it")
        return f"; to have it, download it where there is a network: `hf download {owner}/{name} --local-dir {folder}`{which}"
    if len(folder.parts) == 2 and Path(folder.parts[0]).is_dir():
        return ""
    return (
        f"; if it is a hub name, download it where there is a network (`hf download {folder} --local-dir models/{name}`) and "
        f"pass model.path=models/{name}"
    )
