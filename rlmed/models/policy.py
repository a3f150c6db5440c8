"""The policy: a transformers model with the interface for sampling and learning.

Engine and learner share its modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import get_session
from huggingface_hub.constants import ENDPOINT
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from rlmed.core.files.near_paths import near_path
from rlmed.core.process.foreign import foreign
from rlmed.core.types import Prompt
from rlmed.models.attention import ATTENTION_NAME, AttentionLayout, PackedLayout, sliding_windows
from rlmed.models.cpu.fused import use_fused_layers
from rlmed.models.cpu.linear import use_fast_linears
from rlmed.models.cpu.products import settle_products
from rlmed.models.decode_kernels import DecodeKernels, choose_kernels
from rlmed.models.decoder import Decoder, LayersLayout, accept_decoder
from rlmed.models.families import Family, family_of, unsampleable_token_ids
from rlmed.models.folder.adapter import adapter_base, is_adapter, merge_adapter
from rlmed.models.folder.contents import check_folder
from rlmed.models.folder.end_tokens import find_end_tokens
from rlmed.models.folder.loaded import check_loaded
from rlmed.models.folder.weight_files import check_weight_files, stored_dtype
from rlmed.models.logprobs import chunked_logprobs, logprobs_no_grad, masked_logits
from rlmed.models.merging import Weight
from rlmed.models.quantized import check_not_quantized, four_bits
from rlmed.models.varlen import VarlenLayout, choose_attention
from rlmed.models.vision import use_linear_patches, use_varlen_vision

if TYPE_CHECKING:
    from rlmed.models.adapters import Adapters

MODEL_FOLDERS = frozenset(("model", "models", "checkpoints", "weights", "llm", "llms", "hf"))
"""Usual names of folders that hold models."""
HUB_S = 5.0
"""Seconds for the hub's first answer."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy:
    """Model whose decoder runs on packed rows under a layout.

    Example:
        >>> policy = load_policy(Path("outputs/run/checkpoints/step-300"))          # doctest: +SKIP
        >>> hidden = policy.hidden(token_ids, positions, layout, image_inputs)     # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Decoder | None = None,
        *,
        adapters: Adapters | None = None,
        compiled_decode: bool | None = None,
    ) -> None:
        """Wrap a model with shared-prefix attention, its decoder for sampling, its adapters."""
        # no supported family has dropout; eval also keeps transformers from warning
        self.model: PreTrainedModel = model.eval()
        self.decoder = decoder
        self.adapters = adapters
        """Adapters in the model, if there are any: they alone are trained."""
        self._decode_kernels: DecodeKernels | None = None
        self._compiled_decode = compiled_decode
        self.family = family_of(model.config)
        projection = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear) or projection.bias is not None:
            raise ValueError(
                f"{model.config.model_type}: the vocabulary projection must be a linear layer without bias"
            )
        self.projection: nn.Linear = projection
        self.banned_token_ids: tuple[int, ...] = unsampleable_token_ids(model.config)
        self.windows: tuple[int, ...] = sliding_windows(model)
        """Widths of sliding windows in its attention, each once."""
        self._banned: Tensor = torch.tensor(self.banned_token_ids, dtype=torch.int64, device=self.device)
        ends = model.generation_config.eos_token_id
        self.end_token_ids: frozenset[int] = frozenset([ends] if isinstance(ends, int) else ends or ())
        if not self.end_token_ids:
            raise ValueError(
                "the model folder's generation_config.json names no eos_token_id: completions could not end"
            )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.projection.weight.dtype

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(decoder layers, key-value heads, head width): the geometry of a key-value cache."""
        config = self.model.config.get_text_config()
        width = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, config.num_key_value_heads, width

    def freeze(self, parts: Collection[str]) -> None:
        """Train all parts but these (see `rlmed.models.families.PARTS`); adapters alone if any."""
        trained = None if self.adapters is None else self.adapters.parameters()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.family.part_of(name) not in parts if trained is None else name in trained)

    def weights(self) -> Iterator[Weight]:
        """Yield the weights by their names without adapters."""
        if self.adapters is not None:
            yield from self.adapters.weights()
            return
        for name, parameter in self.model.named_parameters():
            yield Weight(name, parameter)

    def publish(self) -> None:
        """Renew what an engine in this process computes with, where that is not the parameters."""
        if self.adapters is not None:
            self.adapters.publish()

    def image_inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """Return a prompt's image tensors on the policy's device; empty for text."""
        return {name: torch.as_tensor(array).to(self.device) for name, array in prompt.image_inputs.items()}

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """Return a prompt's CPU rotary positions, int64 [R, P]: R is 3 for M-RoPE and 1 for text.

        Completion token t has position `positions.max() + 1 + t` in every row.
        """
        grids = {name: torch.as_tensor(array) for name, array in prompt.image_inputs.items() if name != "pixel_values"}
        return self.family.positions(self.model, torch.as_tensor(prompt.token_ids), grids).cpu()

    def packed_layout(
        self, groups: Sequence[tuple[int, Sequence[int]]], token_ids: Tensor | None = None
    ) -> PackedLayout | VarlenLayout:
        """Lay out a row for the attention that suits this policy.

        Groups are (prompt length, completion lengths); `token_ids`, int64 [N], tell where images
        are.
        """
        known = self.family.both_ways and token_ids is not None
        both_ways = token_ids == self.model.config.image_token_id if known else None
        backend = choose_attention(self.device, self.dtype, self.kv_shape[2]).backend
        # kernels without padding know neither images seen both ways nor windows across sequences
        images = both_ways is not None and bool(both_ways.any())
        longest = max(prompt + max(lengths, default=0) for prompt, lengths in groups)
        if backend is None or images or any(window < longest for window in self.windows):
            return PackedLayout.build(groups, self.device, both_ways if images else None)
        return VarlenLayout.build(groups, backend, self.device)

    def decode_kernels(self) -> DecodeKernels:
        """Return the kernels that decode steps can use; probed when first asked for."""
        if self._decode_kernels is None:
            self._decode_kernels = choose_kernels(
                self.model.get_decoder(),
                self.decoder,
                self.projection,
                self._banned,
                position_rows=self.family.position_rows,
                compiled=self._compiled_decode is not False,
            )
        return self._decode_kernels

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        layout: AttentionLayout | LayersLayout,
        image_inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the final hidden states of a packed row; in inference mode by `decoder`.

        Args:
            token_ids: int64 [N].
            positions: int64 [R, N], see `prompt_positions`.
            layout: who attends to whom.
            image_inputs: forward arguments of the row's images, in row order.

        Returns:
            [N, d] in the policy's dtype.
        """
        # M-RoPE models take [3, batch, N], text models [batch, N]
        position_ids = positions.unsqueeze(1) if self.family.position_rows > 1 else positions
        if self.decoder is not None and not image_inputs and torch.is_inference_mode_enabled():
            return self.decoder(self.decoder.embeddings(token_ids), position_ids, layout)
        output = self.model.base_model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids,
            use_cache=False,
            layout=layout,
            **(self.family.arguments(image_inputs) if image_inputs else {}),
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [M, V] logits of [M, d] hidden states; -inf at unsampleable tokens."""
        return masked_logits(hidden, self.projection.weight, self._banned)

    def logprobs(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the targets' log-probabilities and entropies, see `chunked_logprobs`."""
        return chunked_logprobs(hidden, self.projection.weight, targets, temperature=temperature, banned=self._banned)

    def logprobs_no_grad(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the targets' log-probabilities, no gradient; see `logprobs.logprobs_no_grad`."""
        return logprobs_no_grad(hidden, self.projection.weight, targets, temperature=temperature, banned=self._banned)


def merge_image_inputs(inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the image tensors of several prompts in row order."""
    names = {name: None for entry in inputs for name in entry}
    return {name: torch.cat([entry[name] for entry in inputs if name in entry]) for name in names}


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected weights: our error is one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_policy(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    onednn: Collection[str] | None = None,
    compiled_decode: bool | None = None,
    quantize: Collection[str] = (),
) -> Policy:
    """Load a Hugging Face folder (or hub name) as a policy; merge an adapter into its base.

    Args:
        folder: model folder or hub name.
        dtype: of the parameters, a key of `DTYPES`.
        device: of the parameters.
        onednn: uses of oneDNN from now on, see `rlmed.models.cpu.products.settle_products`.
        compiled_decode: False: decode steps on a CPU are not compiled.
        quantize: parts whose linear layers are kept in 4 bits, see `rlmed.models.quantized`.

    Raises:
        ValueError: if it is not a model folder, lacks weights, or its family is not supported.
    """
    config = load_config(folder)
    if is_adapter(Path(folder)):
        check_not_quantized(folder, quantize)
        base = adapter_base(Path(folder))
        policy = load_policy(base, dtype=dtype, device=device, onednn=onednn, compiled_decode=compiled_decode)
        merge_adapter(policy.model, Path(folder))
        return policy
    family, on_cpu = family_of(config), torch.device(device).type == "cpu"
    if Path(folder).is_dir():
        check_weight_files(Path(folder))
    ends = find_end_tokens(folder, config)
    tied = bool(config.tie_word_embeddings)  # transformers changes it if the weights disagree
    target = DTYPES[dtype]
    quantized = four_bits(config, quantize, target, torch.device(device)) if quantize else {}
    # unconverted, weights stay mapped from the file: the host holds no copy
    read_as = target if on_cpu or quantized else stored_dtype(Path(folder)) or target
    model, found = _read_model(folder, family, dtype=read_as, **quantized)
    check_loaded(Path(folder), found, tied=tied)
    _settle_generation(model, ends.ids)
    if on_cpu:
        settle_products(config, onednn)
        use_fast_linears(model)
    else:
        # cuDNN's attention makes a plan for every new shape (0.5 s, never freed), and its dQ under
        # a mask can be NaN
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not quantized:  # else it is there
            _move(model, torch.device(device), target)
    use_fused_layers(model)
    use_linear_patches(model)
    use_varlen_vision(model)
    decoder = accept_decoder(model, position_rows=family.position_rows)
    return Policy(model, decoder, compiled_decode=compiled_decode)


def _read_model(folder: Path, family: Family, **arguments: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a model with shared-prefix attention; also return transformers' loading info."""
    auto = AutoModelForImageTextToText if family.vision else AutoModelForCausalLM
    attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"} if family.vision else ATTENTION_NAME
    with (
        _quiet_loading(),
        foreign(
            f"the weights of model {str(folder)!r} cannot be loaded",
            "Copy or download its *.safetensors and config.json again",
        ),
    ):
        loaded: Any = auto.from_pretrained(
            folder,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    model, found = loaded  # a pair, because of output_loading_info
    return model, found


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Copy parameters from their files to the device one by one; buffers keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


def _settle_generation(model: PreTrainedModel, end_token_ids: tuple[int, ...]) -> None:
    """Name every end token in the generation settings, also for checkpoints; make sure they save.

    rlmed uses nothing else of them. transformers loads contradictory ones with a warning but
    refuses to save them, which would show only at the first checkpoint.
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
    """Load the configuration of a model folder or hub name.

    Raises:
        ValueError: naming the folder and what is missing.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_folder(folder)
        with foreign(f"{folder / 'config.json'} is damaged or of an unknown type", "Copy or download it again"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
            return config
    if folder.is_file():
        raise ValueError(f"model {str(folder)!r} is a file: give the folder that contains it and its config.json")
    if folder.is_absolute() or len(folder.parts) > 2 or ".." in folder.parts:
        # a hub name is NAME or OWNER/NAME
        advice = near_path(folder) or "correct the path"
        raise ValueError(f"model folder {str(folder)!r} does not exist (relative to {Path.cwd()}); {advice}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=not _hub_answers())
    except (OSError, ValueError) as error:
        near = near_path(folder)
        raise ValueError(
            f"model {str(folder)!r} is neither a folder in {Path.cwd()} nor available from the hub: "
            f"{str(error).splitlines()[0]} If it is a folder, {near or 'correct the path'}{_to_download(folder)}"
        ) from error
    return config


def _hub_answers() -> bool:
    """Return False if the hub cannot be reached; asked once, for it tries long."""
    try:
        with foreign(f"{ENDPOINT} does not answer", "Check the network"):
            get_session().head(ENDPOINT, timeout=HUB_S)
    except ValueError:
        return False
    return True


def _to_download(folder: Path) -> str:
    """Return the end of a sentence on how to download a model found neither here nor on the hub.

    The `models` of `models/Qwen2-VL-2B-Instruct` is not an owner on the hub: such a name needs its
    owner.
    """
    name = folder.name
    if len(folder.parts) == 2 and folder.parts[0].lower() in MODEL_FOLDERS:
        owner, which = ("Qwen", "") if name.startswith("Qwen") else ("OWNER", ", OWNER being its publisher")
        return f"; to get it, run on a machine with a network: `hf download {owner}/{name} --local-dir {folder}`{which}"
    if len(folder.parts) == 2 and Path(folder.parts[0]).is_dir():
        return ""
    return (
        f"; if it is a hub name, download it on a machine with a network (`hf download {folder} --local-dir models/{name}`) "
        f"and pass model.path=models/{name}"
    )
