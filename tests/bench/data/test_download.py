"""COCO from a server of the tests: verified, extracted whole, and each failure one clear line."""

import errno
import functools
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench import cli
from bench.data import download
from bench.data.download import Archive, DownloadError
from bench.errors import InputError


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def pictures(split: str, count: int) -> dict[str, bytes]:
    return {f"{split}/": b""} | {f"{split}/{n:012}.jpg": bytes([n]) * 20_000 for n in range(count)}


FILES = ("instances_train2017.json", "instances_val2017.json", "captions_val2017.json")
CONTENTS = {
    "zips/train2017.zip": zipped(pictures("train2017", 5)),
    "zips/val2017.zip": zipped(pictures("val2017", 3)),
    "annotations/annotations_trainval2017.zip": zipped(
        {f"annotations/{name}": name.encode() for name in FILES}
    ),
}
VAL = ["annotations/instances_val2017.json", *(f"val2017/{n:012}.jpg" for n in range(3))]


class Server:
    def __init__(self) -> None:
        self.contents = dict(CONTENTS)
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = outer.contents.get(self.path.lstrip("/"))
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def archive(address: str, images: int = 0, content: bytes | None = None) -> Archive:
    content = content or CONTENTS[address]
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Archive(address, len(content), digest, images)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    archives = {
        "train2017": archive("zips/train2017.zip", 5),
        "val2017": archive("zips/val2017.zip", 3),
        "annotations": archive("annotations/annotations_trainval2017.zip"),
    }
    monkeypatch.setattr(download, "ARCHIVES", archives)
    monkeypatch.setattr(download, "RETRIES", 0)
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
    download.download(root, splits, base_url=server.url, log=said.append)
    return said


def names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_what_is_missing_is_loaded_verified_and_extracted(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "new" / "coco"
    assert len(load(server, root)) == 2
    assert names(root) == VAL
    for name in VAL[1:]:
        assert (root / name).read_bytes() == pictures("val2017", 3)[name]
    assert load(server, root) == []
    assert len(server.asked) == 2
    load(server, root, ("train2017", "val2017"))
    assert "/zips/val2017.zip" not in server.asked[2:]
    assert len(names(root)) == len(VAL) + 6


def test_an_archive_that_is_there_is_used_if_it_is_right(server: Server, tmp_path: Path) -> None:
    (tmp_path / "val2017.zip").write_bytes(CONTENTS["zips/val2017.zip"])
    load(server, tmp_path)
    assert server.asked == ["/annotations/annotations_trainval2017.zip"]
    (tmp_path / "train2017.zip").write_bytes(b"damaged")
    load(server, tmp_path, ("train2017",))
    assert "/zips/train2017.zip" in server.asked


def test_what_is_not_the_published_archive_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = bytearray(CONTENTS["zips/val2017.zip"])
    damaged[9_000] ^= 255
    server.contents["zips/val2017.zip"] = bytes(damaged)
    with pytest.raises(DownloadError, match=r"val2017\.zip: MD5 hash"):
        load(server, tmp_path)
    # Even where its MD5 is right: each member has a checksum.
    right = archive("zips/val2017.zip", 3, bytes(damaged))
    monkeypatch.setitem(download.ARCHIVES, "val2017", right)
    with pytest.raises(DownloadError, match=r"val2017\.zip cannot be extracted: Bad CRC-32"):
        load(server, tmp_path)
    assert not (tmp_path / "val2017").exists()


def test_a_stopped_extraction_leaves_no_split(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = zipfile.ZipFile._extract_member

    def stopped(self: zipfile.ZipFile, member: Any, *rest: Any) -> str:
        if "val2017/000000000002" in getattr(member, "filename", member):
            raise KeyboardInterrupt
        return whole(self, member, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(server, tmp_path)
    assert not (tmp_path / "val2017").exists()
    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", whole)
    asked = len(server.asked)
    load(server, tmp_path)
    assert (len(server.asked), names(tmp_path)) == (asked, VAL)


def test_too_little_space_is_said_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage(tmp_path)._replace(free=70_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"has 0\.0 GB free; about .* GB are needed"):
        load(server, tmp_path)
    assert server.asked == []


def test_what_fails_is_one_clear_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part" / "val2017").mkdir(parents=True)
    with pytest.raises(InputError, match=r"val2017 is there, but has 0 of 3 images"):
        load(server, tmp_path / "part")
    nowhere = functools.partial(download.download, base_url="http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"^http://127\.0\.0\.1:9/annotations/.*refused"):
        nowhere(tmp_path / "new", ["val2017"])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(InputError, match=r"cannot write to .*: No space left on device") as caught:
        load(server, tmp_path / "new")
    assert "\n" not in str(caught.value)


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
