"""Whom the chat's server answers: pages of its own address, with small requests of the kinds that its page makes."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
POSTS = ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset", "/login")


class Gate:
    """Refuses what did not come from the page: a foreign Host (a name that was made to point here), a foreign Origin
    (another page in the same browser), uploads, and requests larger than any that the page sends.
    """

    def __init__(self, app: ASGIApp, *, public: set[str], largest: int):
        """
        Args:
            public: further hosts under which the page is served; may grow while it is.
            largest: bytes of a request.
        """
        self.app, self.public, self.largest = app, public, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self.fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(f"{fault}\n", 403)(scope, receive, send)

    def fault(self, scope: Scope) -> str | None:
        """Why a request is refused; None where it is not."""
        headers, port = Headers(scope=scope), scope["server"][1]
        hosts = {f"{name}:{port}" for name in LOCAL_NAMES} | self.public
        if port == 80:
            hosts.update(LOCAL_NAMES)
        named = [host.lower() for host in headers.getlist("host")]
        forwarded = [host.lower() for host in headers.getlist("x-forwarded-host")]
        if len(named) != 1 or not hosts.issuperset(named + forwarded):
            return f"Open the page as http://127.0.0.1:{port}/: it is served under no other name and port."
        origins = headers.getlist("origin")
        if any(origin.lower() not in (f"http://{host}", f"https://{host}") for origin in origins for host in named):
            return "Another page asks."
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if scope["method"] != "POST" or scope["path"].rstrip("/") not in POSTS:
            return "The page makes no such request; it takes no files."
        size = headers.get("content-length", "")
        if not size.isdecimal() or int(size) > self.largest:
            return f"A request has at most {self.largest} bytes, and says how many."
        return None


def host_of(address: str) -> str:
    """Host and port of an address, as a browser names them in `Host`."""
    return urlsplit(address).netloc.lower()
