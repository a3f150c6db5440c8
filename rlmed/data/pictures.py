"""A model's own rules for pictures: pixels or tiles, and the tokens that stand for them.

transformers has both for every model: an image processor, and a processor class that writes a
picture's tokens (visual tokens, marks of rows and tiles). They are asked here, so no rule of a
model is written down a second time.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file

from rlmed.core.chat import PROCESSOR
from rlmed.core.files.damage import read_json
from rlmed.core.process.foreign import foreign

FORWARD = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
"""What image processors return for the model; the rest describes tiles for the text."""
EDGES = ("shortest_edge", "longest_edge")
"""Keys of `size` in image processors of the Qwen-VL families: areas in pixels."""
PREPROCESSOR = "preprocessor_config.json"
PIXEL_LIMITS = "Qwen2VLImageProcessor"
"""Image processor with pixel limits."""
STEP = 0.8
"""Factor on the sides of a picture where nothing but its size decides the number of its tiles."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The pictures of a prompt as the model takes them."""

    texts: tuple[str, ...]
    """What stands in the prompt for each picture's placeholder."""
    inputs: Mapping[str, npt.NDArray[Any]]
    """The model's forward arguments; pictures, tiles and patches along the first axis."""


class Pictures:
    """Prepares pictures for one model.

    Example:
        >>> pictures = load_pictures(Path("models/Qwen2-VL-2B-Instruct"), config, tokenizer)    # doctest: +SKIP
        >>> pictures.prepare([Image.new("RGB", (112, 112))]).inputs["image_grid_thw"]            # doctest: +SKIP
        array([[1, 8, 8]])
    """

    def __init__(self, rules: ProcessorMixin, own: Mapping[str, Any]) -> None:
        """Use the rules of a processor of transformers, which `own` settings made."""
        self._rules, self._own = rules, own
        self.image_processor: BaseImageProcessor = rules.image_processor
        self.placeholder: str = rules.image_token  # type: ignore[attr-defined]
        """What the chat template writes for a picture."""
        defaults = rules.valid_processor_kwargs._defaults  # type: ignore[attr-defined]
        self._settings: dict[str, Any] = dict(defaults.get("images_kwargs", {}))
        size = self.image_processor.to_dict().get("size") or {}
        self.limits: tuple[int, int] | None = None
        """Smallest and largest area in pixels; None if the model has another rule than areas."""
        if kind_of(self.image_processor) == PIXEL_LIMITS and _whole(size):
            self.limits = (size[EDGES[0]], size[EDGES[1]])
        self.unmarked = kind_of(self.image_processor) == PIXEL_LIMITS
        """Whether a picture's own text is visual tokens alone: without others between them, the
        model would take two pictures for one.
        """

    @property
    def processor(self) -> ProcessorMixin:
        """transformers' processor of the model, but for videos; without this object's limits."""
        return self._rules

    def limited(self, min_pixels: int | None, max_pixels: int | None) -> Pictures:
        """Return pictures with other limits; None keeps the model's.

        Raises:
            ValueError: for impossible limits, or a model that has none.
        """
        if min_pixels is None and max_pixels is None:
            return self
        if self.limits is None:
            raise ValueError(
                f"min_pixels={min_pixels} and max_pixels={max_pixels}: the model's {kind_of(self.image_processor)} has no such "
                "limits; set model.min_pixels=null model.max_pixels=null, and bound its tiles by data.max_prompt_tokens"
            )
        low, high = self.limits
        changed = copy.copy(self)
        changed.limits = (low if min_pixels is None else min_pixels, high if max_pixels is None else max_pixels)
        if not 0 < changed.limits[0] <= changed.limits[1]:
            limits = f"min_pixels={changed.limits[0]} and max_pixels={changed.limits[1]}"
            raise ValueError(f"{limits}: pixel limits must satisfy 0 < min_pixels <= max_pixels")
        return changed

    def prepare(self, images: Sequence[Image.Image], **settings: Any) -> Prepared:
        """Prepare the RGB pictures of a prompt, each as large as the model takes it."""
        if self.limits is not None:
            settings = {"size": dict(zip(EDGES, self.limits, strict=True))} | settings
        # nested: a model may treat the pictures of one prompt otherwise than one alone
        nested: Any = [list(images)]
        features: Any = self.image_processor(images=nested, return_tensors="np", **(self._settings | settings))
        inputs = {name: np.asarray(features[name]) for name in FORWARD if name in features}
        if inputs["pixel_values"].ndim == 5:  # [pictures, tiles, colours, height, width]
            inputs["pixel_values"] = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[2:])
        typed = {
            name: array.astype(np.float32 if name == "pixel_values" else np.int64) for name, array in inputs.items()
        }
        return Prepared(tuple(self._rules.replace_image_token(features, i) for i in range(len(images))), typed)

    def given_size(self, prepared: Prepared) -> tuple[int, int]:
        """Return width and height of a prompt's first picture in pixels, as the model is given it.

        Only for models whose pictures are not cut into tiles (`limits`).
        """
        patch = (self.image_processor.to_dict() | self._settings)["patch_size"]
        _, rows, columns = prepared.inputs["image_grid_thw"][0].tolist()
        return columns * patch, rows * patch

    def smaller(self, images: Sequence[Image.Image], prepared: Prepared, room: int) -> Iterator[Prepared]:
        """Prepare pictures again and again with fewer tokens, the largest ones first.

        Args:
            images: the pictures.
            prepared: what `prepare` has made of them.
            room: tokens that they may have together, where the model lets them be chosen.
        """
        known = self.image_processor.to_dict() | self._settings
        if self.limits is not None:
            yield from self._in_room(images, prepared, room, known["patch_size"], known["merge_size"])
        elif known.get("do_image_splitting"):
            tile = known["max_image_size"]["longest_edge"]
            for tiles in range((known["size"]["longest_edge"] - 1) // tile, 0, -1):
                yield self.prepare(images, size={"longest_edge": tiles * tile})
        elif known.get("crop_to_patches"):
            for tiles in range(known["max_patches"] - 1, 0, -1):
                yield self.prepare(images, max_patches=tiles)
        elif known.get("image_grid_pinpoints") and len(images) == 1:  # each of several is one tile, whatever its size
            smallest, (image,) = min(min(pair) for pair in known["image_grid_pinpoints"]), images
            while max(image.size) > smallest:
                image = image.resize((max(1, round(image.width * STEP)), max(1, round(image.height * STEP))))
                yield self.prepare([image])

    def _in_room(
        self, images: Sequence[Image.Image], prepared: Prepared, room: int, patch: int, merge: int
    ) -> Iterator[Prepared]:
        """Prepare pictures with one limit of their areas: at most `room` tokens together."""
        assert self.limits is not None
        low = self.limits[0]
        tokens = prepared.inputs["image_grid_thw"].prod(axis=1) // merge**2
        share = common_limit(tokens.tolist(), room)
        while True:
            area = max(low, share * (patch * merge) ** 2)
            fewer = self.prepare(images, size={EDGES[0]: low, EDGES[1]: area})
            yield fewer
            if area == low:
                return
            # a long and narrow picture takes more than its share
            excess = int(fewer.inputs["image_grid_thw"].prod(axis=1).sum()) // merge**2 - room
            share -= max(1, math.ceil(excess / len(images)))

    def save(self, folder: Path) -> None:
        """Save the image processor, with these limits, and the text's settings beside a model."""
        processor: Any = copy.deepcopy(self.image_processor)
        if self.limits is not None:
            processor.size = dict(zip(EDGES, self.limits, strict=True))
        processor.save_pretrained(folder)
        if self._own:
            content = {**self._own, "processor_class": type(self._rules).__name__}
            (folder / PROCESSOR).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_pictures(folder: Path | str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Pictures:
    """Load the rules of a vision model from its folder or hub name.

    Always uses the PIL-based image processor: the torchvision one resizes to slightly different
    pixels.

    Raises:
        ValueError: if the folder has no image processor, one of another kind, or a tokenizer
            without the model's tokens for pictures.
    """
    advice = "copy preprocessor_config.json and processor_config.json from the model that this one was trained from"
    with foreign(f"model {str(folder)!r} cannot prepare pictures", advice.capitalize()):
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        rules, own = _rules(folder, config, image_processor, tokenizer)
        expected = IMAGE_PROCESSOR_MAPPING_NAMES[config.model_type]["pil"].removesuffix("Pil")
    pictures = Pictures(rules, own)
    size = image_processor.to_dict().get("size") or {}
    if kind_of(image_processor) != expected or (expected == PIXEL_LIMITS and not _whole(size)):
        limits = " with pixel limits" if expected == PIXEL_LIMITS else ""
        raise ValueError(
            f"{Path(folder) / PREPROCESSOR} is of a {kind_of(image_processor)} with size {size}, not of a {expected}{limits}: "
            "copy it from the model that this one was trained from"
        )
    return pictures


def _rules(
    folder: Path | str,
    config: PreTrainedConfig,
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[ProcessorMixin, dict[str, Any]]:
    """Return transformers' processor of a model, but for videos, and the settings that made it."""
    whole: Any = PROCESSOR_MAPPING[type(config)]
    attributes = [name for name in whole.get_attributes() if "video" not in name]
    # videos need torchvision, and none is ever shown
    kind: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda _: attributes)})
    parameters = inspect.signature(whole.__init__).parameters
    file = cached_file(folder, PROCESSOR, _raise_exceptions_for_missing_entries=False)
    written = {} if file is None else read_json(Path(file))
    parts = {*whole.get_attributes(), "chat_template"}
    own = {name: value for name, value in written.items() if name in parameters and name not in parts}
    absent = dict.fromkeys([name for name in whole.get_attributes() if name in parameters and name not in attributes])
    with _without_videos(sys.modules[whole.__module__]):
        return kind(image_processor=image_processor, tokenizer=tokenizer, **absent, **own), own


@contextmanager
def _without_videos(module: ModuleType) -> Iterator[None]:
    """Let a module of transformers make a processor without the library that only videos need.

    One of them refuses to start without num2words, which spells the number of a video's frames.
    """
    missing = [name for name, value in vars(module).items() if name == "num2words" and value is None]
    for name in missing:
        setattr(module, name, str)
    try:
        yield
    finally:
        for name in missing:
            setattr(module, name, None)


def common_limit(counts: Sequence[int], total: int) -> int:
    """Return the largest limit of each count by which they add up to `total` at most.

    Example:
        >>> common_limit([100, 16, 60], 100)
        42
    """
    rest = sorted(counts)
    while len(rest) > 1 and rest[0] * len(rest) <= total:
        total -= rest.pop(0)
    return total // len(rest)


def _whole(size: Mapping[str, Any]) -> bool:
    return all(isinstance(size.get(edge), int) for edge in EDGES)


def kind_of(image_processor: BaseImageProcessor) -> str:
    """Return the name of an image processor's class, whatever library it computes with."""
    return type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
