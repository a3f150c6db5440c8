"""Upload an exported folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from rlmed.core.process.display import one_line
from rlmed.core.process.foreign import brief

TRANSPORT = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
"""What the library that carries the hub's requests raises."""
OUTDATED = ("*.safetensors", "*.bin", "*.index.json", "adapter_config.json", "processor_config.json", "chat_template.*")
"""Files of an earlier upload that would be read beside the new ones, or in their place."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_access(name: str) -> str:
    """Check, before anything is exported, that the hub lets us write a model of this name.

    Returns:
        The name with its owner.

    Raises:
        ValueError: without network or token, or for a token or name that the hub refuses.
    """
    with _refusing(name):
        api = HfApi()
        user = api.whoami()
        return name if "/" in name else f"{user['name']}/{name}"


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload a folder as the hub's model `name`, private unless it is there already or `public`.

    Returns:
        Its address.

    Raises:
        ValueError: if the hub cannot be reached or refuses it; the folder stays.
    """
    with _refusing(name):
        api = HfApi()
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Export of an rlmed run",
            repo_type="model",
            delete_patterns=list(OUTDATED),
        )
        return str(url)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn the hub's errors into one line that says what to do."""
    given = f"--push-to-hub {name}"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{given}: no token for {constants.ENDPOINT}: {LOG_IN}") from error
    except HFValidationError as error:
        raise ValueError(f"{given}: {one_line(error)}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{given}: HF_HUB_OFFLINE is set: unset it to upload") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = (
            f"{LOG_IN}, with a token that may write"
            if status in (401, 403)
            else "try again, or upload the folder later"
        )
        raise ValueError(f"{given}: {constants.ENDPOINT} refuses: {one_line(error)}: {advice}") from error
    except TRANSPORT as error:
        raise ValueError(
            f"{given}: {constants.ENDPOINT} cannot be reached ({brief(error)}): check the network, or leave it out and upload "
            "the folder with `hf upload`"
        ) from error
