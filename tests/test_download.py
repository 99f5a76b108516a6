"""Download: a local server that breaks off, ignores ranges, changes its file or lies."""
import http.server
import re
import threading

import pytest

from data import download as module
from data.files import UserError

pytestmark = pytest.mark.slow

BODY = bytes(i * 7 % 251 for i in range(300_000))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body`. Class attributes set its faults; `asked` records the Range of each request."""
    body, etag, date, stop_after = BODY, '"1"', None, None
    ranges, length, status, wrong_start = True, None, 0, 0
    honours_if_range = True

    def do_GET(self):
        cls, wanted = type(self), self.headers["Range"]
        cls.asked.append(wanted)
        if cls.status:
            return self.send_error(cls.status)
        match = self.headers["If-Range"] in (None, cls.etag, cls.date) or not cls.honours_if_range
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
    """The handler class; `url` is its address."""
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
    """The one-sentence error of a failed download, which leaves nothing at path."""
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


def test_a_complete_download_leaves_no_part(server, path, capsys):
    assert download(server.url, path, is_body) == path
    assert path.read_bytes() == BODY and names(path) == ["data.bin"]
    assert capsys.readouterr().err == "data.bin: 292 of 292 kB\n"  # not a terminal: one line


def test_on_a_terminal_one_line_is_updated(server, path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("time.monotonic", iter(range(1000)).__next__)
    download(server.url, path)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.count("\r") > 2 and shown.endswith("\rdata.bin: 292 of 292 kB\n")


def test_an_existing_file_needs_no_network(path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    download("http://127.0.0.1:1/", path, is_body)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("etag, date", [('"1"', None), (None, "Sat, 01 Jan 2022 00:00:00 GMT"),
                                        ('W/"1"', "Sat, 01 Jan 2022 00:00:00 GMT")])
def test_resumes_where_it_broke_off(server, path, etag, date):
    server.etag, server.date = etag, date
    says = broken_off(server, path)
    assert "ended after 100000 of 300000 bytes" in says
    assert "is kept: rerun the same command to resume" in says
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


@pytest.mark.parametrize("honours", [True, False], ids=["If-Range honoured", "If-Range ignored"])
def test_a_changed_file_starts_over(server, path, honours):
    broken_off(server, path)
    server.etag, server.body, server.honours_if_range = '"2"', BODY[::-1], honours
    download(server.url, path)
    assert path.read_bytes() == BODY[::-1]


def test_a_changed_file_that_breaks_off_again_has_its_own_tag(server, path):
    broken_off(server, path)
    server.etag, server.body = '"2"', BODY[::-1]
    broken_off(server, path, 50_000)
    download(server.url, path)
    assert path.read_bytes() == BODY[::-1] and server.asked[-1] == "bytes=50000-"


def test_without_etag_and_date_the_download_starts_over(server, path):
    server.etag = None
    assert "kept" not in broken_off(server, path)
    download(server.url, path)
    assert path.read_bytes() == BODY and server.asked == [None, None]


def test_416_and_an_unrequested_range_start_over(server, path):
    broken_off(server, path)
    server.body, server.honours_if_range = BODY[:70_000], False
    download(server.url, path)
    assert path.read_bytes() == BODY[:70_000] and server.asked == [None, "bytes=100000-", None]
    path.unlink()
    server.body = BODY
    broken_off(server, path)
    server.wrong_start = 5
    download(server.url, path)
    assert path.read_bytes() == BODY


def test_wrong_content_length(server, path):
    server.length = 400_000
    assert "300000 of 400000" in refused(server.url, path)
    (path.parent / "data.bin.part").unlink()
    server.length = 1000  # only the check can tell
    assert "is not the expected file and was deleted" in refused(server.url, path, check=is_body)
    assert "data.bin.part" not in names(path)
    server.length = -1  # none given
    download(server.url, path)
    assert path.read_bytes() == BODY


def test_an_unexpected_file_is_not_kept(server, path):
    server.body, server.length = b"<html>log in</html>", -1
    says = refused(server.url, path, check=is_body)
    assert "data.bin.part is a login page" in says and "--from" in says and "data.bin.part" not in names(path)
    server.body = BODY
    download(server.url, path, is_body)
    assert path.read_bytes() == BODY


def test_a_complete_but_unchecked_part_is_not_fetched_again(server, path):
    def interrupted(path):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        download(server.url, path, interrupted)
    server.stop_after = 0  # nothing more is sent
    download(server.url, path, is_body)
    assert path.read_bytes() == BODY and names(path) == ["data.bin"]


def test_an_unrequested_partial_reply(server, path, monkeypatch):
    send = http.server.BaseHTTPRequestHandler.send_response
    monkeypatch.setattr(server, "send_response", lambda self, status: send(self, 206))
    assert "partial reply to a full request" in refused(server.url, path)


def test_http_errors_leave_nothing_new_and_keep_the_part(server, path):
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


def test_no_network_no_such_host_and_a_silent_server(path, monkeypatch):
    assert "refused" in refused("http://127.0.0.1:1/x", path)
    assert "(" in refused("http://no-such-host.invalid/x", path) and not path.parent.exists()

    def silent(request, timeout):
        assert timeout == 30
        raise TimeoutError("timed out")
    monkeypatch.setattr("urllib.request.urlopen", silent)
    assert "(timed out)" in refused("http://127.0.0.1/x", path)
