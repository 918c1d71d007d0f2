"""Try a tuned model in the browser, beside the model it was made from.

    python -m pipeline.chat runs/quickstart                            # prints the address to open
    python -m pipeline.chat runs/quickstart/checkpoints/step_000060    # any checkpoint too
    python -m pipeline.chat runs/quickstart --auth                     # asks for a password, and prints one
    python -m pipeline.chat runs/quickstart --auth --port 8080 --share # and a public link, through Gradio's servers

Both continue the same opening with the same sampling noise, so what differs is what training did. The page is served to
this machine alone, under the names 127.0.0.1 and localhost, and loads nothing from the network. Without --auth every
user of this machine can open it. CHAT_AUTH=user:password in the environment sets the login.
"""

import argparse
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.assembly import make_reward, open_run, open_tuned
from pipeline.chatting import Chat
from pipeline.config import Config, ConfigError
from pipeline.errors import user_errors
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.runtime.command import raise_error
from pipeline.runtime.gpus import cuda_is_usable
from pipeline.trust import check_trust

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
LOGIN_VARIABLE = "CHAT_AUTH"  # of the environment: user:password
OTHER_BYTES = 65_536  # of a request beside the opening, of whose letters JSON makes up to 12 bytes each

Login = tuple[str, str]  # user, password


def main() -> None:
    with user_errors():
        asked = parse(sys.argv[1:])
        run, config = open_run(__doc__, asked.run)
        check_trust(run, config, trusted=asked.trust)
        login = choose_login(os.environ.get(LOGIN_VARIABLE), asked=asked.auth, share=asked.share)
        check_port(asked.port)
        chat = open_chat(run, config)
        serve(chat, run, port=asked.port, share=asked.share, login=login)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; raises `UserError`."""
    parser = argparse.ArgumentParser(
        "python -m pipeline.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = raise_error
    parser.add_argument("run", metavar="RUN", help="A finished run's folder, or RUN/checkpoints/step_….")
    parser.add_argument("--port", type=int, help="Port of this machine; by default the first free one from 7860.")
    parser.add_argument("--share", action="store_true", help="Also make a public link, through Gradio's servers.")
    parser.add_argument(
        "--auth", action="store_true",
        help=f"Ask for user and password: those of {LOGIN_VARIABLE}, or else ones made up and printed.",
    )  # fmt: skip
    parser.add_argument(
        "--trust", action="store_true", help="Run the code, or ask the server, that the run's reward names."
    )
    return parser.parse_args(arguments)


def choose_login(given: str | None, *, asked: bool, share: bool) -> Login | None:
    """The login of the page, which `given` (user:password) sets; None where none is wanted. Raises `ConfigError`."""
    if given is not None:
        user, _, password = given.partition(":")
        if not (user.strip() and password):
            raise ConfigError(f"{LOGIN_VARIABLE} is not of the form user:password; set it so, or unset it.")
        return user.strip(), password
    if share and not asked:
        raise ConfigError("--share lets everybody who has or guesses the link use the page; add --auth.")
    return ("chat", secrets.token_urlsafe(12)) if asked else None


def check_port(port: int | None) -> None:
    """Raise `ConfigError` where something listens there already."""
    if port is None:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} cannot be used: {error}; choose another, or leave it out.") from error


def open_chat(run: Path, config: Config) -> Chat:
    """Load the reward and both models; raises `UserError`."""
    device = "cuda" if cuda_is_usable() else "cpu"
    _, tokenizer = load_config_and_tokenizer(config.model.model_path)
    reward = make_reward(config, device)
    policy, reference = open_tuned(run, config, device)
    return Chat(policy, reference, reward, tokenizer, config)


def serve(chat: Chat, run: Path, *, port: int | None, share: bool, login: Login | None) -> None:
    """Show the page until Ctrl-C; raises `ConfigError` where no port is free."""
    with tempfile.TemporaryDirectory(prefix="chat-") as private:  # Gradio's own is one for all users of the machine
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": private}  # read when it is imported
        page, address = launch(chat, run, port=port, share=share, login=login)
        who = who_can_reach(login, share=share and page.share_url is not None)
        print(f"Chat with {run}: {address}   (Ctrl-C ends it)\n{who}", flush=True)
        page.block_thread()


def launch(chat: Chat, run: Path, *, port: int | None, share: bool, login: Login | None) -> "tuple[Blocks, str]":
    """Start to serve the page; returns it and its address. Raises `ConfigError` where no port is free."""
    from starlette.middleware import Middleware

    from pipeline.chat_gate import Gate, host_of
    from pipeline.chat_page import CSS, make_page, make_theme

    public: set[str] = set()
    gate = Middleware(Gate, public=public, largest=12 * chat.longest_opening + OTHER_BYTES)
    page = make_page(chat, run)
    try:
        _, address, shared = page.queue(max_size=20).launch(
            server_name=HOST,
            server_port=port,
            share=share,
            auth=login,
            app_kwargs={"middleware": [gate]},
            max_file_size=1,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            theme=make_theme(),
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"no port for the page: {error}") from error
    if shared:
        public.add(host_of(shared))
    return page, shared or address


def who_can_reach(login: Login | None, *, share: bool) -> str:
    """What to tell who serves the page of who else can open it."""
    if login is None:
        return "Every user of this machine can open it, and use the models; --auth asks for a password."
    where = "Everybody who has the address" if share else "Every user of this machine"
    password = f"with the one in {LOGIN_VARIABLE}" if LOGIN_VARIABLE in os.environ else f"and password: {login[1]}"
    return f"{where} is asked to log in. User: {login[0]}, {password}"


if __name__ == "__main__":
    main()
