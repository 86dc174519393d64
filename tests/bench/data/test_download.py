"""Loading COCO: from a server on this machine, with small archives and every kind of trouble."""

import errno
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cli
from bench.data import download
from bench.data.download import Archive, Downloader, DownloadError
from bench.errors import InputError

ANNOTATION_FILES = ("instances_train2017.json", "instances_val2017.json", "captions_val2017.json")


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pictures(split: str, count: int) -> dict[str, bytes]:
    rng = np.random.default_rng(count)
    return {f"{split}/": b""} | {f"{split}/{n:012}.jpg": rng.bytes(20_000) for n in range(count)}


CONTENTS = {
    "zips/train2017.zip": zipped(pictures("train2017", 5)),
    "zips/val2017.zip": zipped(pictures("val2017", 3)),
    "annotations/annotations_trainval2017.zip": zipped(
        {f"annotations/{name}": name.encode() for name in ANNOTATION_FILES}
    ),
}


def archive(address: str, images: int = 0) -> Archive:
    content = CONTENTS[address]
    return Archive(address, len(content), hashlib.md5(content).hexdigest(), images)


class Server:
    """Serves `contents`; `cuts` are bytes after which the next answers break off."""

    def __init__(self) -> None:
        self.contents = dict(CONTENTS)
        self.cuts: list[int] = []
        self.errors: list[int] = []
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        body = self.contents.get(request.path.lstrip("/"))
        if self.errors or body is None:
            request.send_error(self.errors.pop(0) if self.errors else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(body):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else len(body)
        request.wfile.write(body[start:end])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(
        download,
        "ARCHIVES",
        {
            "train2017": archive("zips/train2017.zip", 5),
            "val2017": archive("zips/val2017.zip", 3),
            "annotations": archive("annotations/annotations_trainval2017.zip"),
        },
    )
    # No proxy of the machine stands before its own address.
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def load(server: Server, root: Path, splits: tuple[str, ...] = ("val2017",)) -> list[str]:
    said: list[str] = []
    Downloader(root, base_url=server.url, pause=0, say=said.append).download(splits)
    return said


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


VAL = ["annotations/instances_val2017.json", *(f"val2017/{n:012}.jpg" for n in range(3))]


def test_loads_verifies_and_extracts(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "new" / "coco"
    said = load(server, root, ("train2017", "val2017"))
    assert names(root) == sorted(
        [
            *VAL,
            "annotations/instances_train2017.json",
            *(f"train2017/{n:012}.jpg" for n in range(5)),
        ]
    )
    expected = pictures("val2017", 3)
    for name in VAL[1:]:
        assert (root / name).read_bytes() == expected[name]
    assert sum("is right" in line for line in said) == 3


def test_what_is_there_is_not_loaded_again(server: Server, tmp_path: Path) -> None:
    load(server, tmp_path)
    assert len(server.asked) == 2
    said = load(server, tmp_path)
    assert len(server.asked) == 2
    assert all("there already" in line for line in said)
    load(server, tmp_path, ("train2017", "val2017"))
    assert [path for path, _ in server.asked[2:]] == [
        "/annotations/annotations_trainval2017.zip",
        "/zips/train2017.zip",
    ]


def test_a_broken_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    # The first answers are of the annotations.
    server.cuts = [100, 200, 1 << 30, 5_000, 30_000, 7]
    load(server, tmp_path)
    assert names(tmp_path) == VAL
    ranges = [asked for path, asked in server.asked if path == "/zips/val2017.zip"]
    assert ranges == [None, "bytes=5000-", "bytes=35000-", "bytes=35007-"]


def test_a_second_call_continues_the_first(server: Server, tmp_path: Path) -> None:
    server.cuts = [1 << 30, 5_000] + [0] * 20
    with pytest.raises(DownloadError, match=r"val2017\.zip: .* 5000 of \d+ bytes are in"):
        load(server, tmp_path)
    assert (tmp_path / "val2017.zip.part").stat().st_size == 5_000
    server.cuts, server.asked = [], []
    load(server, tmp_path)
    assert server.asked == [("/zips/val2017.zip", "bytes=5000-")]
    assert names(tmp_path) == VAL


def test_a_server_without_ranges_sends_the_whole(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1 << 30, 5_000]
    load(server, tmp_path)
    assert names(tmp_path) == VAL


def test_an_error_of_the_server_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.errors = [503, 500]
    load(server, tmp_path)
    assert names(tmp_path) == VAL


def test_an_archive_that_is_not_there_is_said_at_once(server: Server, tmp_path: Path) -> None:
    del server.contents["zips/val2017.zip"]
    with pytest.raises(DownloadError, match=r"zips/val2017\.zip: 404 Not Found$"):
        load(server, tmp_path)
    assert len(server.asked) == 2


def test_an_archive_of_another_size_is_refused(server: Server, tmp_path: Path) -> None:
    server.contents["zips/val2017.zip"] += b"x"
    size = len(CONTENTS["zips/val2017.zip"])
    with pytest.raises(DownloadError, match=rf"has {size + 1} bytes; .* has {size}$"):
        load(server, tmp_path)


def test_a_damaged_archive_is_removed_and_loaded_anew(server: Server, tmp_path: Path) -> None:
    sound = CONTENTS["zips/val2017.zip"]
    server.contents["zips/val2017.zip"] = sound[:9_000] + b"!" + sound[9_001:]
    with pytest.raises(DownloadError, match=r"is damaged.*MD5.*removed") as caught:
        load(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == VAL[:1]
    server.contents = dict(CONTENTS)
    load(server, tmp_path)
    assert names(tmp_path) == VAL


def test_a_partial_file_that_is_too_long_is_loaded_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017.zip.part").write_bytes(b"x" * 100_000)
    load(server, tmp_path)
    assert names(tmp_path) == VAL


def test_an_archive_of_the_user_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017.zip").write_bytes(CONTENTS["zips/val2017.zip"])
    load(server, tmp_path)
    assert [path for path, _ in server.asked] == ["/annotations/annotations_trainval2017.zip"]
    assert names(tmp_path) == VAL


def test_a_damaged_archive_of_the_user_is_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017.zip").write_bytes(CONTENTS["zips/val2017.zip"][:-1])
    with pytest.raises(DownloadError, match=r"val2017\.zip is damaged.*; remove it$"):
        load(server, tmp_path)
    assert (tmp_path / "val2017.zip").exists()


def test_damage_in_an_archive_is_found(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its MD5 is that of the damaged file: each member has a checksum."""
    damaged = bytearray(CONTENTS["zips/val2017.zip"])
    damaged[9_000] ^= 255
    server.contents["zips/val2017.zip"] = bytes(damaged)
    right = Archive("zips/val2017.zip", len(damaged), hashlib.md5(damaged).hexdigest(), 3)
    monkeypatch.setitem(download.ARCHIVES, "val2017", right)
    with pytest.raises(DownloadError, match=r"val2017\.zip cannot be extracted: Bad CRC-32"):
        load(server, tmp_path)
    assert not (tmp_path / "val2017").exists()


def test_an_extraction_that_was_stopped_is_done_again(server: Server, tmp_path: Path) -> None:
    whole = zipfile.ZipFile.extract
    seen: list[str] = []

    def stopped(self: zipfile.ZipFile, member: Any, path: Any = None) -> str:
        if "val2017/" in member.filename:
            seen.append(member.filename)
            if len(seen) == 3:
                raise KeyboardInterrupt
        return whole(self, member, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", stopped)
        with pytest.raises(KeyboardInterrupt):
            load(server, tmp_path)
    assert not (tmp_path / "val2017").exists()
    asked = len(server.asked)
    load(server, tmp_path)
    assert len(server.asked) == asked
    assert names(tmp_path) == VAL


def test_too_little_space_is_said_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(tmp_path)._replace(free=70_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"has 0\.0 GB free; about .* GB are needed"):
        load(server, tmp_path)
    assert server.asked == []


def test_a_full_disk_is_one_clear_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(InputError, match=r"cannot write to .*: No space left on device") as caught:
        load(server, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_split_that_is_there_in_part_is_not_touched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "1.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"val2017 is there, but has 1 of 3 images"):
        load(server, tmp_path)
    assert names(tmp_path) == ["val2017/1.jpg"]


@pytest.mark.usefixtures("server")
def test_no_server_is_one_clear_line(tmp_path: Path) -> None:
    nowhere = Downloader(tmp_path, base_url="http://127.0.0.1:9", pause=0)
    with pytest.raises(DownloadError, match=r"^http://127\.0\.0\.1:9/annotations/.*refused"):
        nowhere.download(["val2017"])


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["data", "coco", "--root", str(tmp_path), "--base-url", server.url]
    assert cli.main([*options, "--splits", "val2017", "--keep-archives"]) == 0
    assert f"--data {tmp_path}" in capsys.readouterr().out
    assert "val2017.zip" in names(tmp_path)
    del server.contents["zips/train2017.zip"]
    assert cli.main(options) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("python -m bench data coco: failed: http://127.0.0.1")
    assert cli.main([*options, "--splits", "val2016"]) == 2
    assert "did you mean 'val2017'" in capsys.readouterr().err
    assert cli.main(["data", "coco", "--root", str(tmp_path), "--base-url", "images.x.org"]) == 2
    assert "http://" in capsys.readouterr().err


def test_the_published_archives_are_three() -> None:
    assert set(download.ARCHIVES) == {"train2017", "val2017", "annotations"}
    for found in download.ARCHIVES.values():
        assert len(bytes.fromhex(found.md5)) == 16
        assert found.name.endswith("2017.zip")
