"""A published file is fetched once, gone on with where it broke off, and held against what it was
when it first came.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engram import read_dataset
from engram.benchmark.data import download as module
from engram.benchmark.data import sources
from engram.benchmark.data.download import fetched
from engram.cli import app
from engram.errors import EngramError, FactError
from tests.helpers import local_server
from tests.helpers.data_samples import SAMPLES, write

BODY = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()


@dataclass
class Server:
    """Files over HTTP, with the faults of one that is far away.

    Attributes:
        breaks: after so many bytes each answer ends; an answer less for every one of them.
        ranges: whether it sends parts, or whole files whatever was asked for.
        sized: whether it says how long an answer is.
        tagged: whether it names a file's version.
        asked: path and Range of every request, in their order.
    """

    files: dict[str, bytes]
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    sized: bool = True
    tagged: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        if request.path not in self.files:
            request.send_error(404)
            return
        body, start = self.files[request.path], 0
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        if wanted is not None and self.ranges and request.headers.get("If-Range") in (None, tag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                request.send_error(416)
                return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.tagged:
            request.send_header("ETag", tag)
        if self.sized:
            request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        request.wfile.write(body[start:][: self.breaks.pop(0)] if self.breaks else body[start:])


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server({"/a.json": BODY})
    with local_server.serving(do_GET=served.answer) as served.url:
        yield served


@pytest.fixture
def closed() -> str:
    """Return an address at which nobody listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        return f"http://127.0.0.1:{other.server_port}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once_and_its_checksum_noted(server, tmp_path):
    told: list[tuple[str, int, int]] = []
    path = fetched(
        f"{server.url}/a.json", tmp_path / "new", progress=lambda *news: told.append(news)
    )
    assert path.read_bytes() == BODY and names(tmp_path / "new") == ["a.json", "a.json.sha256"]
    assert path.with_name("a.json.sha256").read_text() == DIGEST + "\n"
    assert told[-1] == ("a.json", len(BODY), len(BODY)) and [done for _, done, _ in told] == sorted(
        {done for _, done, _ in told}
    )
    assert fetched(f"{server.url}/a.json", tmp_path / "new") == path
    assert server.asked == [("/a.json", None)]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, tmp_path):
    server.breaks = [100_000, 1, 50_000]
    told: list[int] = []
    path = fetched(
        f"{server.url}/a.json",
        tmp_path,
        progress=lambda _, done, total: told.append(done) or total == len(BODY) or 1 / 0,
    )
    assert path.read_bytes() == BODY
    assert [part for _, part in server.asked] == [
        None,
        "bytes=100000-",
        "bytes=100001-",
        "bytes=150001-",
    ]
    assert told == sorted(set(told)) and told[-1] == len(BODY)


def test_a_download_given_up_goes_on_in_the_next_call(server, tmp_path):
    server.breaks = [10] * 4
    with pytest.raises(
        EngramError,
        match=r"/a\.json could not be fetched: .*40 of 256000 bytes.* Try again \(what came is "
        r"kept\)",
    ):
        fetched(f"{server.url}/a.json", tmp_path)
    assert (
        names(tmp_path) == ["a.json.part", "a.json.part.version"]
        and (tmp_path / "a.json.part").read_bytes() == BODY[:40]
    )
    assert fetched(f"{server.url}/a.json", tmp_path).read_bytes() == BODY
    assert server.asked[-1] == ("/a.json", "bytes=40-") and names(tmp_path) == [
        "a.json",
        "a.json.sha256",
    ]


def test_a_server_that_sends_no_parts_is_asked_for_the_whole(server, tmp_path):
    server.ranges, server.breaks = False, [1000]
    assert fetched(f"{server.url}/a.json", tmp_path).read_bytes() == BODY


def test_a_server_that_does_not_say_how_much_there_is(server, tmp_path):
    server.sized = False
    assert fetched(f"{server.url}/a.json", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("left", [BODY, BODY + b"more"])
def test_what_was_left_whole_or_of_another_file_is_not_built_upon(server, tmp_path, left):
    (tmp_path / "a.json.part").write_bytes(left)
    assert fetched(f"{server.url}/a.json", tmp_path).read_bytes() == BODY


def given_up(server: Server, folder: Path) -> None:
    """Resume when a thousand bytes came and the file was then replaced at the server by another
    one of the same length.
    """
    server.breaks = [1000, 0, 0, 0]
    with pytest.raises(EngramError, match="could not be fetched"):
        fetched(f"{server.url}/a.json", folder)
    assert (folder / "a.json.part").stat().st_size == 1000
    server.files["/a.json"] = BODY[::-1]


def test_a_file_that_has_changed_on_the_server_is_not_glued_to_the_part_of_the_old_one(
    server, tmp_path
):
    given_up(server, tmp_path)
    assert fetched(f"{server.url}/a.json", tmp_path).read_bytes() == BODY[::-1]
    assert names(tmp_path) == ["a.json", "a.json.sha256"]


def test_a_known_checksum_tells_what_was_glued_together_where_the_server_names_no_versions(
    server, tmp_path
):
    server.tagged = False
    given_up(server, tmp_path)
    wanted = hashlib.sha256(BODY[::-1]).hexdigest()
    with pytest.raises(EngramError, match=f"has sha256 .*, expected {wanted}"):
        fetched(f"{server.url}/a.json", tmp_path, sha256=wanted)
    assert names(tmp_path) == []
    assert fetched(f"{server.url}/a.json", tmp_path, sha256=wanted).read_bytes() == BODY[::-1]


def test_a_file_that_is_not_what_was_promised_is_not_kept(server, tmp_path):
    with pytest.raises(
        EngramError,
        match=f"has sha256 {DIGEST}, expected {'0' * 64}: the file has changed or was damaged",
    ):
        fetched(f"{server.url}/a.json", tmp_path, sha256="0" * 64)
    assert names(tmp_path) == []
    assert fetched(f"{server.url}/a.json", tmp_path, sha256=DIGEST).read_bytes() == BODY


def test_a_file_that_was_changed_afterwards_is_told(server, tmp_path):
    path = fetched(f"{server.url}/a.json", tmp_path)
    path.write_bytes(BODY + b" ")
    with pytest.raises(
        EngramError, match=f"a.json has sha256 .*, expected {DIGEST}: it was changed. Delete it"
    ):
        fetched(f"{server.url}/a.json", tmp_path)
    path.unlink()
    assert fetched(f"{server.url}/a.json", tmp_path) == path and path.read_bytes() == BODY


@pytest.mark.parametrize("sized", [True, False])
def test_a_file_larger_than_any_data_set_is_not_fetched(server, tmp_path, monkeypatch, sized):
    monkeypatch.setattr(module, "_LARGEST", 1000)
    server.sized = sized
    with pytest.raises(EngramError, match=r"a.json has over 0 GB, more than any published data"):
        fetched(f"{server.url}/a.json", tmp_path)
    assert not (tmp_path / "a.json").exists() and len(server.asked) == 1


@pytest.mark.parametrize("end", ["..", "", "..\\victim"])
def test_a_name_that_leaves_the_folder_is_refused(server, tmp_path, end):
    with pytest.raises(EngramError, match="no name of a file inside"):
        fetched(f"{server.url}/{end}", tmp_path / "new")
    assert not server.asked


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_fetched(server, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (Path("/dev/null/data"), tmp_path / "file" / "data"):
        with pytest.raises(EngramError, match=r"a.json cannot be kept: .*set ENGRAM_CACHE to a"):
            fetched(f"{server.url}/a.json", folder)
    assert not server.asked


def test_without_a_network_the_address_is_told_and_that_a_path_will_do(closed, tmp_path):
    message = (
        rf"{re.escape(closed)}/a\.json could not be fetched: .*refused.*download it by other means "
        rf"and give its path"
    )
    with pytest.raises(EngramError, match=message):
        fetched(f"{closed}/a.json", tmp_path)
    assert names(tmp_path) == []


def test_a_file_that_is_not_there_is_told(server, tmp_path):
    with pytest.raises(EngramError, match=r"/none\.json could not be fetched: HTTP Error 404"):
        fetched(f"{server.url}/none.json", tmp_path)


# -- data sets by name -----------------------------------------------------------------------------


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Every named data set, published at the server, with a record each."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    for name, source in sources.SOURCES.items():
        if source.url is not None:
            at = f"/{name}/{source.url.rpartition('/')[2]}"
            sample = SAMPLES["known" if name == "known" else source.form]
            server.files[at] = write(tmp_path / "a.json", [sample]).read_bytes()
            monkeypatch.setitem(sources.SOURCES, name, replace(source, url=server.url + at))
    return server


@pytest.mark.parametrize(
    "name", [name for name, source in sources.SOURCES.items() if source.url is not None]
)
def test_every_named_data_set_is_fetched_and_has_the_form_that_is_said_of_it(published, name):
    source = sources.SOURCES[name]
    first, again = read_dataset(name), read_dataset(name)
    assert (first.name, first.form, len(first.records)) == (name, source.form, 1)
    assert again.digest == first.digest and len(published.asked) == 1


def test_reference_texts_come_from_beside_the_file_and_only_if_asked_for(published):
    folder = "/counterfact"
    published.files[f"{folder}/attribute_snippets.json"] = (
        b'[{"relation_id": "P17", "target_id": "Q419", "samples": [{"name": "a", "text": "of '
        b'Peru"}]}]'
    )
    published.files[f"{folder}/tfidf_vocab.json"] = b'{"peru": 0}'
    published.files[f"{folder}/idf.npy"] = b"damaged"
    assert read_dataset("counterfact").references is None
    with pytest.raises(
        FactError, match=r"idf\.npy is no numpy file: .*delete it, and it is fetched again"
    ):
        read_dataset("counterfact", references=True)
    assert sorted(path for path, _ in published.asked) == sorted(
        [f"{folder}/counterfact.json", *(f"{folder}/{each}" for each in sources._BESIDE)]
    )


def test_the_command_fetches_and_tells_the_file(published, tmp_path):
    done = CliRunner().invoke(app, ["data", "get", "zsre"])
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'cache' / 'data' / 'zsre_mend_eval.json'}" in done.output.replace("\n", "")
    assert "there is nothing to fetch" in CliRunner().invoke(app, ["data", "get", "pocket"]).output


def test_the_command_lists_every_name():
    listed = CliRunner().invoke(app, ["data", "list"]).output.splitlines()
    assert [line.split()[0] for line in listed] == list(sources.SOURCES)


def test_a_name_that_is_none_is_not_fetched():
    with pytest.raises(
        EngramError,
        match=r"data set='zsree': expected 'pocket', 'counterfact'.* \(did you mean 'zsre'\?\)",
    ):
        sources.download("zsree")
