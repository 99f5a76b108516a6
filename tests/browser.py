"""A headless Chromium, driven over its DevTools protocol through a pipe: real keys, real pages."""
import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """with Browser(folder) as browser: tab = browser.open(url); tab.run("document.title")"""

    def __init__(self, folder):
        self.folder, self.count, self.seen = folder, 0, []

    def __enter__(self):
        (theirs, self.to), (self.back, writes) = os.pipe(), os.pipe()

        def three_and_four():
            for fd, number in ((os.dup(theirs), 3), (os.dup(writes), 4)):  # copies: one of them may be 3 or 4
                os.dup2(fd, number)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-pipe", f"--user-data-dir={self.folder}", "about:blank"],
            preexec_fn=three_and_four, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(writes)
        self.reader = open(self.back, "rb")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.reader.close()
        os.close(self.to)

    def ask(self, method, session=None, **params):
        """The result of a command; events that come before it are kept in `seen`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            data = b""
            while not data.endswith(b"\0"):
                if not (byte := self.reader.read(1)):
                    raise RuntimeError("the browser has ended")
                data += byte
            answer = json.loads(data[:-1])
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]
            self.seen.append(answer)

    def open(self, url):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Runtime", "Page", "Log"):
            tab.ask(f"{domain}.enable")
        tab.ask("Page.navigate", url=url)
        tab.wait("document.readyState == 'complete'")
        return tab


class Tab:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def ask(self, method, **params):
        return self.browser.ask(method, self.session, **params)

    def run(self, code):
        """The value of a JavaScript expression, which may be a promise."""
        found = self.ask("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def wait(self, code, seconds=30):
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(code):
            if time.monotonic() > end:
                raise TimeoutError(code)
            time.sleep(0.02)

    def press(self, key, **more):
        """A key, as if it were typed."""
        for kind, text in (("keyDown", key), ("keyUp", "")):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, text=text, **more)
