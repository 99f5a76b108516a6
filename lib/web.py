"""Web: one page for whoever sits at this machine, and for no other page that is open in the browser."""
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data.files import UserError, json_object

LONGEST = 1000  # bytes of a question


def serve(page, reply, port=0):
    """Serve `page`, HTML, on 127.0.0.1 until reply(question) -> (answer, whether that was the last).

    The page asks by POST to its own address; both are JSON objects. That address holds a random token, and
    is printed. Asked from another page (Origin), by another name (Host) or without the token: 403. A script
    or style in the page needs nonce="NONCE"; nothing is loaded from elsewhere. UserError: the port is taken.
    """
    token, nonce = secrets.token_urlsafe(24), secrets.token_urlsafe(12)
    own = f"'nonce-{nonce}'"
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy":
               f"default-src 'none'; script-src {own}; style-src {own}; connect-src 'self'; base-uri 'none'; "
               "form-action 'none'; frame-ancestors 'none'"}

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self):
            if self.trusted(None):  # who opens a page sends no Origin
                self.answer("text/html", page.replace("NONCE", nonce))

        def do_POST(self):
            if not self.trusted():
                return
            try:
                size = int(self.headers["Content-Length"])
                said, last = reply(json_object(self.rfile.read(size if 0 < size < LONGEST else 0)))
            except (TypeError, ValueError, KeyError):
                self.send_error(400)
                return
            self.answer("application/json", json.dumps(said))
            if last:
                threading.Thread(target=self.server.shutdown).start()

        def trusted(self, *origins):
            """Whether the page itself asks, or whoever opens it; else the answer is a 403."""
            host = self.headers["Host"]
            fine = (host in [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
                    and self.headers["Origin"] in (f"http://{host}", *origins)
                    and secrets.compare_digest(self.path.encode(), f"/{token}".encode()))
            if not fine:
                self.send_error(403)
            return fine

        def answer(self, kind, text):
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port}: {getattr(error, 'strerror', error)}") from None
    with server:
        print(f"open http://127.0.0.1:{server.server_port}/{token}", flush=True)
        server.serve_forever()
