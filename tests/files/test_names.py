"""Names in files are data, and files of others are opened with care."""

import os
from pathlib import Path

import pytest

from engram.errors import EngramFileError
from engram.files.names import check_regular, inside, open_regular, read_bytes, read_text


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../victim",
        "a/../../victim",
        "a/..",
        "C:\\victim",
        "C:victim",
        "\\\\host\\share\\victim",
        "..\\victim",
        "",
        "a\0b",
        None,
        3,
        ["a"],
    ],
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(EngramFileError, match="is no name of a file inside"):
        inside(tmp_path, name)


def test_a_name_inside_is_a_path_there(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.safetensors") == tmp_path / "a" / "b.safetensors"


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("victim")
    home = tmp_path / "home"
    home.mkdir()
    (home / "out").symlink_to(tmp_path / "victim")
    (home / "up").symlink_to(tmp_path)
    (home / "circle").symlink_to(home / "circle")
    (home / "real").write_text("real")
    (home / "in").symlink_to(home / "real")
    for name in ("out", "up/victim", "circle"):
        with pytest.raises(EngramFileError):
            inside(home, name)
    assert read_text(inside(home, "in")) == "real"
    (tmp_path / "link").symlink_to(home)  # the folder itself is what the user named
    assert read_text(inside(tmp_path / "link", "real")) == "real"


def test_links_of_the_hubs_cache_are_followed_into_its_blobs_and_nowhere_else(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "456").write_text("blob")
    (tmp_path / "victim").write_text("victim")
    (snapshot / "config.json").symlink_to("../../blobs/456")
    (snapshot / "bad.json").symlink_to("../../../victim")
    assert read_text(inside(snapshot, "config.json")) == "blob"
    with pytest.raises(EngramFileError, match="link that leaves"):
        inside(snapshot, "bad.json")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        for read in (read_bytes, read_text, check_regular, open_regular):
            with pytest.raises(EngramFileError, match=f"is {kind}; expected a regular file"):
                read(path)
    with pytest.raises(EngramFileError, match="is a device"):
        read_bytes("/dev/zero")


def test_a_file_larger_than_expected_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(EngramFileError, match="expected at most"):
        read_bytes(tmp_path / "a", limit=4)


def test_what_is_no_text_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(EngramFileError, match="is no text in utf-8"):
        read_text(tmp_path / "a")
