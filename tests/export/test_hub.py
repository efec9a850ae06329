"""The Hub: private by default, silent about tokens, and never the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from llmnorm.errors import UserError
from llmnorm.export import check_repo_id, push_to_hub
from llmnorm.export.hub import download


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub at an address where nothing answers."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def test_an_unreachable_hub_is_a_warning(
    folder: Path, unreachable: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    with caplog.at_level(logging.WARNING, logger="llmnorm.export"):
        status = push_to_hub(folder, "someone/model")
    assert not status.uploaded and status.url is None
    assert "not uploaded to someone/model" in status.message and "ConnectError" in status.message
    assert f"llmnorm export {folder} --push-to-hub someone/model" in status.message
    assert status.message in caplog.text
    assert "hf_abcdefghijklmnop" not in caplog.text + status.message


def test_offline_mode_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    try:
        assert "OfflineModeIsEnabled" in push_to_hub(folder, "someone/model").message
    finally:
        huggingface_hub.close_session()


def test_tokens_in_errors_are_struck_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise PermissionError("denied for Bearer hf_SECRETSECRETSECRET\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    message = push_to_hub(folder, "someone/model").message
    assert "SECRET" not in message and "PermissionError: denied for [hidden]" in message


def test_a_repository_is_private_unless_told_otherwise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def create_branch(self, repo_id: str, **options: Any) -> None:
            calls.append(("branch", options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    status = push_to_hub(folder, "someone/model", revision="step-100")
    assert status.uploaded and status.url == "https://huggingface.co/someone/model"
    assert calls[0] == ("create", {"repo_id": "someone/model", "private": True, "exist_ok": True})
    assert calls[1] == ("branch", {"branch": "step-100", "exist_ok": True})
    assert calls[2][1]["folder_path"] == folder and calls[2][1]["revision"] == "step-100"
    assert all("token" not in options for _, options in calls)
    push_to_hub(folder, "someone/model", private=False)
    assert calls[3][1]["private"] is False


def test_a_download_that_fails_is_a_user_error(unreachable: None) -> None:
    with pytest.raises(
        UserError, match=r"hub:someone/nothing cannot be downloaded: .*check the name and the network"
    ):
        download("someone/nothing")


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "some one/model", "a..b/c", "owner/mo:del", "/abs"])
def test_a_bad_repository_name_is_found_before_the_run(repo_id: str) -> None:
    with pytest.raises(UserError, match="is not a Hub repository; give owner/name"):
        check_repo_id(repo_id)
    check_repo_id("owner/model-1.5_b")
