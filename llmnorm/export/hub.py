"""Upload an export to the Hugging Face Hub, and download initial weights from it.

Uploading never raises: a training run that has ended well is not killed by a network. The token comes from
where `huggingface_hub` looks (HF_TOKEN, `hf auth login`) and is never read, passed on or printed here.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from llmnorm.errors import UserError

logger = logging.getLogger("llmnorm.export")

SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")
REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]{1,96}")
# Weights in safetensors only: a pickle is never downloaded, let alone opened.
DOWNLOADED = ["*.json", "*.safetensors", "*.py", "*.txt", "*.model", "README.md"]


@dataclass(frozen=True)
class PushStatus:
    """Whether an upload arrived; `message` says where it is, or why not and how to repeat it."""

    uploaded: bool
    message: str
    url: str | None = None


def check_repo_id(repo_id: str) -> None:
    """Raise UserError unless `repo_id` has the form owner/name; call it before a long run, not after."""
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise UserError(
            f"{repo_id!r} is not a Hub repository; give owner/name, made of letters, digits, '-', '_' and "
            "'.'."
        )


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Export",
) -> PushStatus:
    """Upload an export to `repo_id`, which is created if need be, private unless told otherwise.

    revision: a branch to upload to, created if need be. A failure of any kind is logged as a warning and
    returned.
    """
    folder = Path(folder)
    retry = f"the export stays in {folder}; to try again: `llmnorm export {folder} --push-to-hub {repo_id}`"
    try:
        from huggingface_hub import HfApi

        check_repo_id(repo_id)
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=["*.tmp*"],
        )
        url = str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo_id}")
        return PushStatus(True, f"uploaded to {url}", url)
    except (
        Exception
    ) as error:  # an upload may fail in ways no list of exceptions foresees, and none is worth the run
        status = PushStatus(False, f"not uploaded to {repo_id}: {_reason(error)}; {retry}")
        logger.warning(status.message)
        return status


def download(repo_id: str, revision: str | None = None) -> Path:
    """The local folder of a Hub repository's config, tokenizer and safetensors (from the cache when offline).

    Raises UserError when there is no such repository or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    check_repo_id(repo_id)
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=DOWNLOADED))
    except (
        Exception
    ) as error:  # the many faces of "not there" and "not reachable" all mean the same to the user
        raise UserError(
            f"hub:{repo_id} cannot be downloaded: {_reason(error)}; check the name and the network (`hf auth "
            "login` for a private repository), or download it elsewhere and give the folder."
        ) from error


def _reason(error: Exception) -> str:
    """The error's type and first line, with anything that looks like a token struck out."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no further detail")
    return SECRET.sub("[hidden]", f"{type(error).__name__}: {first}")
