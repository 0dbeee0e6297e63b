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

TIMEOUT = (10, 60)                  # seconds to connect, seconds without a byte
ATTEMPTS = 5                        # in a row without progress
BACKOFF = 1.0                       # seconds before the second attempt; it doubles each time
SAY_EVERY = 5.0                     # seconds between two lines about a download


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Retry(Exception):
    """(what happened, least seconds to wait): a later request may do better."""


def mismatch(path, size, sha256):
    """Why the file at path is not the expected one, or "" if it is."""
    if size is not None and path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        return f"has sha256 {found} instead of {sha256}"
    return ""


def download(url, path, size=None, sha256=None):
    """Puts the file at url to path, and returns path. A file that is there and has the expected size and
    sha256 is kept; else bytes go to path.part, which a later call continues, and which is renamed to
    path only once verified. Raises UserError, naming url and path, if that cannot be done.
    """
    path, part, etag = Path(path), Path(f"{path}.part"), Path(f"{path}.part.etag")
    failures, most = 0, 0                                    # most: bytes of the longest .part so far
    try:
        if path.exists():
            if not (wrong := mismatch(path, size, sha256)):
                return path
            print(f"{path} {wrong}: fetching it anew", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            resumed = part.exists() and part.stat().st_size > 0
            try:
                if not (resumed and part.stat().st_size == size):
                    request(url, part, etag, size)
                wrong = mismatch(part, size, sha256)
                if not wrong:
                    os.replace(part, path)
                    etag.unlink(missing_ok=True)
                    return path
                part.unlink()
                if not resumed:                              # a fresh copy that is wrong will be wrong again
                    raise OSError(f"it {wrong}; the file at that address changed, or is altered on the way")
                raise Retry(f"the continued copy {wrong}, starting again", 0)
            except Retry as e:
                why, wait = e.args
            reached = part.stat().st_size if part.exists() else 0
            failures, most = (0 if reached > most else failures + 1), max(most, reached)
            if failures >= ATTEMPTS:
                raise OSError(f"{why} ({ATTEMPTS} attempts); check the network or proxy and run the command "
                              "again: it continues where it stopped")
            wait = max(wait, BACKOFF * 2 ** max(failures - 1, 0))
            print(f"{url}: {why}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    except OSError as e:                                     # disk full, no permission, and those raised here
        raise UserError(f"cannot download {url} to {path}: {e.strerror or e}") from None


def request(url, part, etag, size):
    """One request, which continues .part if it can. Raises Retry, and OSError where no repetition helps."""
    import requests  # here, for it takes long to load

    have = part.stat().st_size if part.exists() and etag.exists() else 0
    headers = {"Accept-Encoding": "identity"}                # byte ranges of the file, not of a gzip of it
    if have:                                                 # If-Range: all of it if the file changed
        headers |= {"Range": f"bytes={have}-", "If-Range": etag.read_text()}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
            if r.status_code == 429 or r.status_code >= 500:
                after = r.headers.get("Retry-After", "")
                raise Retry(f"status {r.status_code}", min(int(after), 60) if after.isdecimal() else 0)
            given = r.headers.get("Content-Range", "")
            if r.status_code == 416 and given == f"bytes */{have}":
                return                                       # nothing after what we have: it is complete
            if r.status_code == 416 or r.status_code == 206 and not given.startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)
                raise Retry("the server does not continue what is here, starting again", 0)
            if r.status_code not in (200, 206):
                raise OSError(f"status {r.status_code} {r.reason}; is the address right?")
            have = have if r.status_code == 206 else 0
            if not have:
                part.unlink(missing_ok=True)                 # never a new ETag beside old bytes
                strong = r.headers.get("ETag", "")           # without one nothing tells that the file changed
                etag.write_text(strong) if strong.startswith('"') else etag.unlink(missing_ok=True)
            length = r.headers.get("Content-Length", "")
            receive(r, part, have, have + int(length) if length.isdecimal() else size)
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema) as e:
        raise OSError(str(e)) from None
    except requests.RequestException as e:
        raise Retry(f"connection failed ({type(e).__name__})", 0) from None


def receive(response, part, have, total):
    """Appends the response's body to .part, which holds have bytes of total, and says how far it is."""
    of = f"of {total / 1e6:.1f} MB" if total is not None else "MB"
    print(f"downloading {response.url}: {have / 1e6:.1f} {of}", file=sys.stderr, flush=True)
    said = time.monotonic()
    with open(part, "ab" if have else "wb") as f:
        for chunk in response.iter_content(1 << 14):         # a cut loses the chunk it falls in
            f.write(chunk)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"  {f.tell() / 1e6:.1f} {of}", file=sys.stderr, flush=True)
        if total is not None and f.tell() < total:
            raise Retry("connection closed early", 0)


def hash_of_the_hub(url):
    """The sha256 that the hub, or a mirror of it, names in the header of its answer for a large file."""
    import requests  # here, for it takes long to load

    at = url
    try:
        for _ in range(5):
            reply = requests.head(at, timeout=TIMEOUT)
            sha256 = reply.headers.get("X-Linked-Etag", "").strip('"')
            target = urljoin(at, reply.headers.get("Location", ""))
            if sha256 or not reply.is_redirect or urlsplit(target).netloc != urlsplit(at).netloc:
                break                                        # the storage elsewhere knows no hash
            at = target                                      # a mirror's own redirect
        reply.raise_for_status()
    except requests.RequestException as e:
        raise UserError(f"cannot reach {url} ({e}); fetch it by hand and pass its path") from None
    require(re.fullmatch("[0-9a-f]{64}", sha256), f"{url} comes without a sha256 (X-Linked-Etag) to check it "
            "against; fetch it by hand and pass its path")
    return sha256


