"""Resumable, atomic downloads.

NAME.part holds the bytes received so far and NAME.part.tag their ETag (or date): if the file has changed
on the server since, the download starts over (RFC 9110, sections 13.1.5 and 14).
"""
import http.client
import re
import urllib.error
import urllib.request

from data.files import Progress, UserError


def download(url, path, check, otherwise="fetch it by hand and use --from"):
    """Download url to path unless path exists; returns path. check(file) raises UserError if the file is
    corrupt or not what was expected (a login page, say). UserError: that, or no network; the message ends
    with what to do `otherwise`."""
    if path.exists():
        return path
    part, tag = (path.with_name(path.name + end) for end in (".part", ".part.tag"))
    try:
        fetch(url, part, tag)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a redirect to a bad URL
        code = f"HTTP {error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        why = code + " ".join(str(getattr(error, "reason", error)).split())
        kept = "the part received is kept: rerun the same command to resume, or " * bool(held(part, tag))
        raise UserError(f"can't download {url} ({why}); {kept}{otherwise}") from error
    try:
        check(part)
    except UserError as error:
        part.unlink(), tag.unlink(missing_ok=True)
        raise UserError(f"{url} is not the expected file and was deleted ({error}); {otherwise}") from error
    part.replace(path)
    tag.unlink(missing_ok=True)
    return path


def held(part, tag):
    """The tag of the part received so far; "" if there is nothing to resume."""
    return tag.read_text("latin-1") if tag.exists() and part.exists() and part.stat().st_size else ""


def fetch(url, part, tag):
    """Download the rest of url, or all of it, into part. OSError, HTTPException: it is incomplete."""
    known = held(part, tag)
    have = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing left to send
            raise
        reply = error
    with reply:
        span = re.match(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range") or "")
        fits = span and int(span[1]) == have and validator(reply.headers) == known
        if reply.status == 206 and not have:
            raise OSError("the server sent a partial reply to a full request")
        if reply.status == 416 and reply.headers.get("Content-Range") == f"bytes */{have}":
            return  # it was complete, just not checked yet
        if reply.status == 416 or reply.status == 206 and not fits:
            part.unlink()
            return fetch(url, part, tag)
        total = span[2] if reply.status == 206 else reply.headers.get("Content-Length") or ""
        total = int(total) if total.isdigit() else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if reply.status == 206 else "wb") as file:  # wb: empty before the tag changes
            tag.write_text(validator(reply.headers), "latin-1")
            receive(reply, file, part.stem, total)
    if total not in (None, part.stat().st_size):
        raise OSError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def validator(headers):
    """The value for If-Range: a strong ETag, else the Last-Modified date, else ""."""
    etag = headers.get("ETag") or "W/"
    return (headers.get("Last-Modified") or "") if etag.startswith("W/") else etag


def receive(reply, file, name, total):
    """Append the reply to file and show progress."""
    whole = "" if total is None else f" of {total >> 10}"

    def text():
        return f"{name}: {file.tell() >> 10}{whole} kB"
    with Progress() as progress:
        try:
            while block := reply.read(1 << 16):
                file.write(block)
                progress(text())
        finally:
            progress.say(text())
