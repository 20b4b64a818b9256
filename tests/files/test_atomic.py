"""Files that are written whole or not at all; for folders see tests/edit/test_files.py."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import engram
from engram.errors import EngramError, EngramFileError
from engram.files.atomic import atomic_file, atomic_folder, reserved


def test_the_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def broken() -> None:
        with atomic_file(path) as fresh:
            fresh.write_text("half")
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(EngramFileError, match=r"could not write .*No space.*unchanged; free some"),
        atomic_file(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(EngramFileError, match=r"could not write .*choose a folder that exists"),
        atomic_file(tmp_path / "missing" / "a.txt"),
    ):
        raise AssertionError("the block does not begin")


def test_what_a_killed_writer_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / ".a.txt.new-xyz"
    left.write_text("half")
    folder_left = tmp_path / ".a.txt.new-folder"
    folder_left.mkdir()
    (folder_left / "b").write_text("half")
    with reserved(tmp_path / "a.txt"):
        assert not left.exists()
        assert not folder_left.exists()


def test_what_another_writer_is_writing_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "a.txt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        before = sorted(tmp_path.iterdir())
        with (
            pytest.raises(EngramError, match=rf"a.txt is being written by process {process.pid}\."),
            reserved(tmp_path / "a.txt"),
        ):
            raise AssertionError("the block does not begin")
        assert sorted(tmp_path.iterdir()) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with reserved(tmp_path / "a.txt"):  # the lock of a killed process ends with it
            pass
    assert not list(tmp_path.iterdir())


HOLDS = """
import sys
from engram.files.atomic import atomic_file
with atomic_file(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_reservation_is_also_one_of_its_own_thread(tmp_path: Path) -> None:
    with reserved(tmp_path / "a.txt") as path:
        with atomic_file(path) as fresh:
            fresh.write_text("first")
        with atomic_file(path) as fresh:
            fresh.write_text("second")
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "second"


def test_another_thread_waits_or_is_told(tmp_path: Path) -> None:
    def reserve() -> None:
        with reserved(tmp_path / "a.txt"):
            pass

    with (
        ThreadPoolExecutor(1) as other,
        reserved(tmp_path / "a.txt"),
        pytest.raises(EngramError, match="being written"),
    ):
        other.submit(reserve).result()
    with ThreadPoolExecutor(1) as other:
        other.submit(reserve).result()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.xyz", {"endings": (".png", ".pdf")}, r"'a.xyz' ends in '.xyz'; expected .*'.pdf' or"),
        ("a", {"endings": (".png",)}, r"'a' ends in ''; expected a name that ends in '.png'"),
        ("folder", {}, "is a folder, a pipe or a device"),
        ("pipe", {}, "is a folder, a pipe or a device"),
        ("file", {"folder": True}, "is a file; expected the name of a folder"),
        ("folder", {"folder": True}, "holds other files; expected an empty folder, or none"),
        ("folder", {"folder": True, "replaces": "c"}, "expected a folder with c"),
        ("missing/a", {}, "could not write .*No such file or directory"),
        ("file/a", {"folder": True}, "could not write .*(Not a directory|File exists)"),
        ("a", {"needs": 1 << 60}, r"needs 1,152,921,504,607 MB and .* are free there"),
    ],
)
def test_a_name_that_cannot_be_written_is_an_error_before_the_work(
    tmp_path: Path, name: str, settings: dict, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("b")
    (tmp_path / "file").write_text("file")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EngramFileError, match=message), reserved(tmp_path / name, **settings):
        raise AssertionError("the block does not begin")
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_made_for_a_result_go_if_nothing_came_of_it(tmp_path: Path) -> None:
    with reserved(tmp_path / "a" / "b" / "c", folder=True):
        pass
    assert not list(tmp_path.iterdir())
    with reserved(tmp_path / "a" / "b" / "c", folder=True) as path, atomic_folder(path) as fresh:
        (fresh / "d").write_text("d")
    assert (tmp_path / "a" / "b" / "c" / "d").read_text() == "d"


SAVES = """
import sys
from engram.locate.trace import CausalTrace
traces = [CausalTrace.load(path) for path in sys.argv[1:3]]
print("ready", flush=True)
while True:
    for trace in traces:
        trace.save(sys.argv[3])
"""


def test_a_killed_save_of_a_trace_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    lm = engram.load("pocket")
    prompt = "The Space Needle is located in the city of"
    paths = [tmp_path / name for name in ("0", "1", "trace")]
    for seed, path in enumerate(paths[:2]):
        settings = {"samples": 1, "seed": seed, "sites": ["residual"], "positions": "last"}
        engram.trace(lm, prompt, subject="Space Needle", **settings).save(path)
    paths[2].write_bytes(paths[0].read_bytes())
    command = [sys.executable, "-c", SAVES, *map(str, paths)]
    for attempt in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.03 + 0.0137 * attempt)
            process.send_signal(signal.SIGKILL)
        assert paths[2].read_bytes() in [path.read_bytes() for path in paths[:2]]


def test_a_name_too_long_for_a_temporary_file_is_an_error_before_the_work(tmp_path: Path) -> None:
    name = "a" * 245  # its lock has 251 letters, which is one name; the temporary file has 260
    with pytest.raises(EngramFileError, match="name too long"), reserved(tmp_path / name):
        raise AssertionError("the block does not begin")
    assert not list(tmp_path.iterdir())


def test_the_old_folder_of_a_killed_writer_is_removed_at_the_next_start(tmp_path: Path) -> None:
    for name in ("a", ".a.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b").write_text("b")
    with reserved(tmp_path / "a", folder=True, replaces="b"):
        assert not (tmp_path / ".a.old").exists()
    (tmp_path / "a").rename(tmp_path / ".a.old")  # killed between the two renames
    with reserved(tmp_path / "a", folder=True, replaces="b"):
        assert (tmp_path / ".a.old").exists(), "the only whole one"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "link", replaces="a") as fresh:
            (fresh / "a").write_text(text)
        assert (tmp_path / "disk" / "a").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_circle_of_links_cannot_be_written(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(EngramFileError, match="circle"), reserved(circle, folder=True):
        pass
    assert circle.is_symlink()


def test_a_link_to_a_file_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("victim")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with atomic_file(tmp_path / "link") as fresh:
        fresh.write_text("new")
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "victim").read_text() == "victim"
