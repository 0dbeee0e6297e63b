"""
Download a file, and verify it before it gets its name.
"""
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from configurator import UserError, require

TIMEOUT = (10, 60)                      # seconds to connect, seconds without a byte
ATTEMPTS = 5                            # in a row without progress
BACKOFF = 1.0                           # seconds before the second attempt; it doubles each time
SAY_EVERY = 5.0                         # seconds between two lines about a download
LARGEST = 1 << 30                       # bytes of a file whose size is not known


class Retry(Exception):
    """(what happened, least seconds to wait): a later request may do better."""


def file_sha256(path):
    """Return the sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mismatch(path, size, sha256):
    """Return why the file at path is not the expected one, or "" if it is."""
    with open(path, "rb") as file:
        begin = file.read(1000).lower()
    found = path.stat().st_size
    if b"<html" in begin and begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is a web page; perhaps this network asks you to sign in"
    if found != size and (size or found == 0):
        return f"has {found} bytes instead of {size or 'some'}"
    if sha256 and (digest := file_sha256(path)) != sha256:
        return f"has sha256 {digest} instead of {sha256}"
    return ""


def download(url, path, size=None, sha256=None):
    """
    Put the file at url to path, and return path. A file that is there and is the expected one is kept.

    Bytes go to path.part, which a later call continues. It becomes path once it is verified, by size and
    sha256 where they are known. A web page is never taken for a file. Raises UserError, naming url and path.
    """
    path = Path(path)
    part = Path(f"{path}.part")
    etag = Path(f"{path}.part.etag")
    failures = 0
    most = 0                            # bytes of the longest .part so far
    try:
        if path.exists():
            wrong = mismatch(path, size, sha256)
            if not wrong:
                return path
            print(f"{path} {wrong}: fetching it anew", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            resumed = part.exists() and part.stat().st_size > 0
            try:
                if not (resumed and part.stat().st_size == size):
                    request(url, part, etag, size, sha256)
                wrong = mismatch(part, size, sha256)
                if not wrong:
                    os.replace(part, path)
                    etag.unlink(missing_ok=True)
                    return path
                part.unlink()
                if not resumed:         # a fresh copy that is wrong will be wrong again
                    raise OSError(f"it {wrong}")
                raise Retry(f"the continued copy {wrong}, starting again", 0)
            except Retry as e:
                why, wait = e.args
            reached = part.stat().st_size if part.exists() else 0
            failures = 0 if reached > most else failures + 1
            most = max(most, reached)
            if failures >= ATTEMPTS:
                raise OSError(f"{why} ({ATTEMPTS} attempts); check the network or proxy and run the command "
                              "again: it continues where it stopped")
            wait = max(wait, BACKOFF * 2 ** max(failures - 1, 0))
            print(f"{url}: {why}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    except OSError as e:                # disk full, no permission, and those raised here
        raise UserError(f"cannot download {url} to {path}: {e.strerror or e}") from None


def authorization(url):
    """Return the header that shows the hub the token in HF_TOKEN, if there is one. Nobody else sees it."""
    token = os.environ.get("HF_TOKEN")
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    ours = urlsplit(url)[:2] == (hub.scheme, hub.netloc) and hub.scheme == "https"
    return {"Authorization": f"Bearer {token}"} if token and ours else {}


def request(url, part, etag, size, sha256):
    """Send one request, which continues .part if it can.

    Raises Retry, or OSError where no repetition helps.
    """
    import requests  # here, for it takes long to load

    have = part.stat().st_size if part.exists() and etag.exists() else 0
    headers = {"Accept-Encoding": "identity"}           # byte ranges of the file, not of a gzip of it
    headers |= authorization(url)
    if have:                                            # If-Range: the whole file if it has changed
        headers |= {"Range": f"bytes={have}-", "If-Range": etag.read_text()}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
            status, given = reply.status_code, reply.headers
            if status == 429 or status >= 500:
                after = given.get("Retry-After", "")
                raise Retry(f"status {status}", min(int(after), 60) if after.isdecimal() else 0)
            continues = given.get("Content-Range", "").startswith(f"bytes {have}-")
            if status == 416 or status == 206 and not continues:
                part.unlink(missing_ok=True)
                raise Retry("the server does not continue what is here, starting again", 0)
            if status in (401, 403):
                raise OSError(f"status {status} {reply.reason}; is the address right? If the hub wants a "
                              "token, set HF_TOKEN")
            if status not in (200, 206):
                raise OSError(f"status {status} {reply.reason}; is the address right?")
            if status == 200:
                have = 0
                part.unlink(missing_ok=True)            # never a new ETag beside old bytes
                strong = given.get("ETag", "")          # without one nothing tells that the file changed
                etag.write_text(strong) if strong.startswith('"') else etag.unlink(missing_ok=True)
            length = given.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else size
            if total is None and not sha256 and given.get("Transfer-Encoding") != "chunked":
                raise OSError("the server does not say where the file ends, so a part could pass for it")
            receive(reply, part, have, total, size or (total if sha256 else None) or LARGEST)
    except ValueError as e:                             # no address at all
        raise OSError(str(e)) from None
    except requests.RequestException as e:
        raise Retry(f"connection failed ({type(e).__name__})", 0) from None


def receive(reply, part, have, total, most):
    """Append the body to .part, which holds have bytes of total, and say how far it is.

    Raises Retry if bytes are missing, OSError beyond most bytes.
    """
    of = f"of {total / 1e6:.1f} MB" if total else "MB"
    print(f"downloading {reply.url}: {have / 1e6:.1f} {of}", file=sys.stderr, flush=True)
    said = time.monotonic()
    with open(part, "ab" if have else "wb") as file:
        for chunk in reply.iter_content(1 << 14):       # a cut loses the chunk it falls in
            file.write(chunk)
            if file.tell() > most:
                part.unlink()
                raise OSError(f"it has more than {most} bytes")
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"  {file.tell() / 1e6:.1f} {of}", file=sys.stderr, flush=True)
        if file.tell() < (total or 0):
            raise Retry("connection closed early", 0)


def hash_of_the_hub(url):
    """Return the sha256 that Hugging Face, or a mirror of it, names in its answer for a large file."""
    import requests

    place = url
    try:
        for _ in range(5):
            reply = requests.head(place, timeout=TIMEOUT, headers=authorization(place))
            sha256 = reply.headers.get("X-Linked-Etag", "").strip('"')
            target = urljoin(place, reply.headers.get("Location", ""))
            if sha256 or not reply.is_redirect or urlsplit(target).netloc != urlsplit(place).netloc:
                break                                   # the storage elsewhere knows no hash
            place = target                              # a mirror's own redirect
        reply.raise_for_status()
    except requests.RequestException as e:
        raise UserError(f"cannot reach {url} ({e}); fetch it by hand and pass its path") from None
    require(re.fullmatch("[0-9a-f]{64}", sha256), f"{url} comes without a sha256 (X-Linked-Etag) to check it "
            "against; fetch it by hand and pass its path")
    return sha256
