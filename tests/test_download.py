"""Download: a server on this machine that breaks off, forgets ranges, changes its file or lies."""
import http.server
import re
import threading

import pytest

from data import download as module
from data.records import UserError

BODY = bytes(i * 7 % 251 for i in range(300_000))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body`. Class attributes say how badly; `asked` keeps the Range of each request."""
    body, etag, date, stop_after, ranges, length, status, wrong_start = BODY, '"1"', None, None, True, None, 0, 0
    heeds_if_range = True

    def do_GET(self):
        cls, wanted = type(self), self.headers["Range"]
        cls.asked.append(wanted)
        if cls.status:
            return self.send_error(cls.status)
        match = self.headers["If-Range"] in (None, cls.etag, cls.date) or not cls.heeds_if_range
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and match and cls.ranges else 0
        if start and start >= len(cls.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(cls.body)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            shown = start + cls.wrong_start
            self.send_header("Content-Range", f"bytes {shown}-{len(cls.body) - 1}/{len(cls.body)}")
        for name, value in (("ETag", cls.etag), ("Last-Modified", cls.date)):
            if value:
                self.send_header(name, value)
        length = len(cls.body) - start if cls.length is None else cls.length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(cls.body[start:][: cls.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """The handler's class; its `url` is where it serves."""
    handler = type("Handler", (Server,), {"asked": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/data.bin"
    yield handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "data.bin"


def download(url, path, check=lambda path: None):
    return module.download(url, path, check)


def is_body(path):
    if path.read_bytes() != BODY:
        raise UserError(f"{path} is a login page")


def refused(url, path, **what):
    """The one sentence of the failure; nothing is at path."""
    with pytest.raises(UserError) as error:
        download(url, path, **what)
    assert url in str(error.value) and "\n" not in str(error.value) and not path.exists()
    return str(error.value)


def broken_off(server, path, n=100_000):
    server.stop_after = n
    says = refused(server.url, path)
    server.stop_after = None
    return says


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_whole_file_and_nothing_beside_it(server, path, capsys):
    assert download(server.url, path, is_body) == path
    assert path.read_bytes() == BODY and names(path) == ["data.bin"]
    assert capsys.readouterr().err == "data.bin: 292 of 292 kB\n"  # no terminal: a line


def test_on_a_terminal_one_line_is_rewritten(server, path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("time.monotonic", iter(range(1000)).__next__)
    download(server.url, path)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.count("\r") > 2 and shown.endswith("\rdata.bin: 292 of 292 kB\n")


def test_file_that_is_there_needs_no_network(path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    download("http://127.0.0.1:1/", path, is_body)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("etag, date", [('"1"', None), (None, "Sat, 01 Jan 2022 00:00:00 GMT"),
                                        ('W/"1"', "Sat, 01 Jan 2022 00:00:00 GMT")])
def test_goes_on_where_it_broke_off(server, path, etag, date):
    server.etag, server.date = etag, date
    says = broken_off(server, path)
    assert "ended after 100000 of 300000 bytes" in says and "is kept and the same command goes on" in says
    assert names(path) == ["data.bin.part", "data.bin.part.tag"]
    assert "ended after 150000 of" in broken_off(server, path, 50_000)
    download(server.url, path)
    assert path.read_bytes() == BODY and names(path) == ["data.bin"]
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_server_that_ignores_ranges(server, path):
    broken_off(server, path)
    server.ranges = False
    download(server.url, path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_changed_file_starts_anew(server, path, heeds):
    broken_off(server, path)
    server.etag, server.body, server.heeds_if_range = '"2"', BODY[::-1], heeds
    download(server.url, path)
    assert path.read_bytes() == BODY[::-1]


def test_changed_file_that_breaks_off_again_has_its_own_tag(server, path):
    broken_off(server, path)
    server.etag, server.body = '"2"', BODY[::-1]
    broken_off(server, path, 50_000)
    download(server.url, path)
    assert path.read_bytes() == BODY[::-1] and server.asked[-1] == "bytes=50000-"


def test_without_etag_and_date_nothing_is_promised_and_all_is_fetched_again(server, path):
    server.etag = None
    assert "kept" not in broken_off(server, path)
    download(server.url, path)
    assert path.read_bytes() == BODY and server.asked == [None, None]


def test_416_and_a_range_that_was_not_asked_for_start_anew(server, path):
    broken_off(server, path)
    server.body, server.heeds_if_range = BODY[:70_000], False
    download(server.url, path)
    assert path.read_bytes() == BODY[:70_000] and server.asked == [None, "bytes=100000-", None]
    path.unlink()
    server.body = BODY
    broken_off(server, path)
    server.wrong_start = 5
    download(server.url, path)
    assert path.read_bytes() == BODY


def test_lies_about_the_length(server, path):
    server.length = 400_000
    assert "300000 of 400000" in refused(server.url, path)
    (path.parent / "data.bin.part").unlink()
    server.length = 1000  # nothing but a look at it can tell
    assert "not the file that was expected" in refused(server.url, path, check=is_body)
    assert "data.bin.part" not in names(path)
    server.length = -1  # none given
    download(server.url, path)
    assert path.read_bytes() == BODY


def test_what_is_not_the_file_is_not_kept(server, path):
    server.body, server.length = b"<html>log in</html>", -1
    says = refused(server.url, path, check=is_body)
    assert "data.bin.part is a login page" in says and "--from" in says and "data.bin.part" not in names(path)
    server.body = BODY
    download(server.url, path, is_body)
    assert path.read_bytes() == BODY


def test_what_was_not_looked_at_yet_is_not_fetched_again(server, path):
    def interrupted(path):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        download(server.url, path, interrupted)
    server.stop_after = 0  # nothing more would come
    download(server.url, path, is_body)
    assert path.read_bytes() == BODY and names(path) == ["data.bin"]


def test_a_part_that_nobody_asked_for(server, path, monkeypatch):
    monkeypatch.setattr(server, "send_response", lambda self, status: http.server.BaseHTTPRequestHandler.send_response(self, 206))
    assert "nobody asked for" in refused(server.url, path)


def test_404_leaves_nothing_and_keeps_what_has_come(server, path):
    server.status = 404
    says = refused(server.url, path)
    assert "(HTTP 404 Not Found)" in says and "kept" not in says and not path.parent.exists()
    server.status = 0
    broken_off(server, path)
    server.status = 503
    assert "HTTP 503" in refused(server.url, path) and len(names(path)) == 2
    server.status = 0
    download(server.url, path)
    assert path.read_bytes() == BODY and server.asked[-1] == "bytes=100000-"


def test_no_network_and_no_such_host_and_a_server_that_is_silent(path, monkeypatch):
    assert "refused" in refused("http://127.0.0.1:1/x", path)
    assert "(" in refused("http://no-such-host.invalid/x", path) and not path.parent.exists()

    def silent(request, timeout):
        assert timeout == 30
        raise TimeoutError("timed out")
    monkeypatch.setattr("urllib.request.urlopen", silent)
    assert "(timed out)" in refused("http://127.0.0.1/x", path)
