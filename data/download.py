"""Download: a file from the network, there whole or not at all; what broke off goes on the next time.

NAME.part holds what has come so far and NAME.part.tag the ETag (or date) it belongs to: a file that
has changed on the server since then starts anew (RFC 9110, sections 13.1.5 and 14).
"""
import http.client
import re
import sys
import time
import urllib.error
import urllib.request

from data.records import UserError


def download(url, path, check, otherwise="fetch it by hand and use --from"):
    """url -> path, unless it is there; returns path. check(file) raises UserError where what has come is
    not whole or something else (a login page, say). UserError: that, or no network (it says what to do
    `otherwise`)."""
    if path.exists():
        return path
    part, tag = (path.with_name(path.name + end) for end in (".part", ".part.tag"))
    try:
        fetch(url, part, tag)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: sent to no address
        code = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        why = code + " ".join(str(getattr(error, "reason", error)).split())
        kept = "what has come is kept and the same command goes on, or " * bool(held(part, tag))
        raise UserError(f"cannot download {url} ({why}); {kept}{otherwise}") from error
    try:
        check(part)
    except UserError as error:
        part.unlink(), tag.unlink(missing_ok=True)
        raise UserError(f"{url} is not the file that was expected, and was deleted again ({error}); "
                        f"{otherwise}") from error
    part.replace(path)
    tag.unlink(missing_ok=True)
    return path


def held(part, tag):
    """The tag of what has come so far; "" where there is nothing that can be gone on with."""
    return tag.read_text("latin-1") if tag.exists() and part.exists() and part.stat().st_size else ""


def fetch(url, part, tag):
    """The rest of url, or all of it, into part. Raises OSError, HTTPException: it is not whole."""
    known = held(part, tag)
    have = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: the file has no such rest
            raise
        reply = error
    with reply:
        span = re.match(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range") or "")
        fits = span and int(span[1]) == have and validator(reply.headers) == known
        if reply.status == 206 and not have:
            raise OSError("the server sends a part, which nobody asked for")
        if reply.status == 416 and reply.headers.get("Content-Range") == f"bytes */{have}":
            return  # it was whole, and only not looked at yet
        if reply.status == 416 or reply.status == 206 and not fits:
            part.unlink()
            return fetch(url, part, tag)
        total = span[2] if reply.status == 206 else reply.headers.get("Content-Length") or ""
        total = int(total) if total.isdigit() else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if reply.status == 206 else "wb") as file:  # "wb": empty, then another tag
            tag.write_text(validator(reply.headers), "latin-1")
            receive(reply, file, part.stem, total)
    if total not in (None, part.stat().st_size):
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def validator(headers):
    """What If-Range may name: a strong ETag, else the date of the last change, else nothing."""
    etag = headers.get("ETag") or "W/"
    return (headers.get("Last-Modified") or "") if etag.startswith("W/") else etag


def receive(reply, file, name, total):
    """Append the reply and say how far it is: in one line on a terminal, else a line every 10 s."""
    start, end, pause = ("\r", "", 0.2) if sys.stderr.isatty() else ("", "\n", 10)
    said, whole = time.monotonic(), "" if total is None else f" of {total >> 10}"

    def say(end):
        print(f"{start}{name}: {file.tell() >> 10}{whole} kB", end=end, file=sys.stderr, flush=True)
    try:
        while block := reply.read(1 << 16):
            file.write(block)
            if time.monotonic() > said + pause:
                said = time.monotonic()
                say(end)
    finally:
        say("\n")
