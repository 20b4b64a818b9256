"""Upload an edit to the Hugging Face hub, with its model card.

The token is the environment's or that of `hf auth login`, as everywhere with the hub's library; it
is never an argument, and never in a message. No path of this machine is uploaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram.edit.edit import Edit
from engram.edit.folder_format import save
from engram.edit.lora_export import public_name
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError
from engram.evaluate.model_card import model_card
from engram.model.named_models import NAMED_MODELS

_COMPUTED = ("base", "settings", "diagnostics")  # what an edit records besides facts and texts


def push(edit: Edit | PromptEdit, repo: str, *, private: bool | None = None) -> str:
    """Upload an edit's folder and a README.md made from its receipt; the repository is made if it
    is not there.

    Args:
        repo: OWNER/NAME, or NAME for one of your own.
        private: of a repository that is made; None: as the hub makes it, which is public unless
            an organisation has decided otherwise.
    Returns:
        The address of the repository.
    Raises:
        EngramError: no token, no connection, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise EngramError(
            "no token for the Hugging Face hub; set HF_TOKEN in the environment, or run "
            "'hf auth login' once. A token that may write is made at "
            "https://huggingface.co/settings/tokens"
        )
    shared = _without_paths(edit)
    with tempfile.TemporaryDirectory() as temporary, _one_line(repo, token):
        folder = Path(temporary) / "edit"
        save(shared, folder)
        api = HfApi(token=token)
        made = api.create_repo(repo, private=private, exist_ok=True)
        card = model_card(shared, made.repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=f"Add {shared!r}"
        )
    return str(made)


def _without_paths(edit: Edit | PromptEdit) -> Edit | PromptEdit:
    """Return the edit with models named as on the hub, and files by their names alone."""
    contents = edit.contents()
    record = dict(contents.record)

    def cleaned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: cleaned(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [cleaned(one) for one in value]
        if not isinstance(value, str):
            return value
        if key == "model" and value not in NAMED_MODELS:
            return public_name({"model": value, "model_type": edit.base["model_type"]})
        return Path(value).name if Path(value).is_absolute() else value

    for name in _COMPUTED:
        if name in record:
            record[name] = cleaned(record[name])
    if record["receipt"] is not None:
        model = cleaned(record["receipt"].get("model"), "model")
        record["receipt"] = {**record["receipt"], "model": model}
    return type(edit).from_contents(replace(contents, record=record))


@contextmanager
def _one_line(repo: str, token: str) -> Iterator[None]:
    """Raise what the hub's library raises within the block as one line that says what to do."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the library that it sends requests with
        OfflineModeIsEnabled,
    )

    try:
        yield
    except EngramError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error).split("\n")[0]).replace(token, "the token")
        advice = {
            401: "the token is not valid; make a new one and set HF_TOKEN",
            403: "the token may not write there; choose a repository of yours as OWNER/NAME, or a "
            "token that may write",
        }.get(status, "nothing was uploaded, or not all of it; run it again")
        raise EngramError(f"the hub refused {repo!r} ({status}): {said}; {advice}") from error
    except HFValidationError as error:
        raise EngramError(
            f"{repo!r} is no name of a repository: expected OWNER/NAME of letters, digits, '-', "
            "'_' and '.'"
        ) from error
    except (ValueError, RuntimeError) as error:  # metadata, a file that could not be uploaded
        said = " ".join(str(error).replace(token, "the token").split())
        raise EngramError(f"the hub refused {repo!r}: {said}") from error
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        why = str(error).split("\n")[0].replace(token, "the token")
        raise EngramError(
            f"the hub cannot be reached ({why}); nothing was uploaded. Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
