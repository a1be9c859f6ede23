"""Serve the built site on this machine, so that the page `play` may load its model.

    python tools/serve.py                      http://127.0.0.1:8000
    python tools/serve.py --site _site --port 0

Pages come with the two headers with which a browser lends a page several threads.
"""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APART = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class Handler(SimpleHTTPRequestHandler):
    "Files with the right types, and headers."

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".wasm": "application/wasm",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".gguf": "application/octet-stream",
    }
    headers_sent = APART

    def end_headers(self):
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self):
        "A browser asks for the site's picture, which it does not have: no error."
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *args):
        "Nothing: a page asks for dozens of files."


def server(
    site,  # The folder to serve
    port=0,  # 0: a free one
    threads=True,  # Send the headers that allow threads
):
    "A server of this machine only, to be started with `serve_forever`."
    kind = type("Handler", (Handler,), {"headers_sent": APART if threads else {}})
    return ThreadingHTTPServer(("127.0.0.1", port), partial(kind, directory=str(site)))


def main():
    "Read the command line, serve until Ctrl-C."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", default=ROOT / "_site", help="the built site")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (Path(args.site) / "index.html").is_file():
        parser.exit(1, f"There is no site in {args.site}: make book builds it.\n")
    with server(args.site, args.port) as http:
        print(f"http://127.0.0.1:{http.server_port}/play.html   (Ctrl-C ends it)", flush=True)
        try:
            http.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
