"""Try a tuned model in the browser, beside the model it was made from.

    python -m pipeline.chat runs/quickstart                            # prints the address to open
    python -m pipeline.chat runs/quickstart/checkpoints/step_000060    # any checkpoint too
    python -m pipeline.chat runs/quickstart --port 8080 --share        # and a public link, through Gradio's servers

Both continue the same opening with the same sampling noise, so what differs is what training did. The page is served to
this machine alone and loads nothing from the network.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from pipeline.assembly import make_reward, open_run, open_tuned
from pipeline.chatting import Chat
from pipeline.config import Config, ConfigError
from pipeline.errors import user_errors
from pipeline.models.vocabulary import load_config_and_tokenizer
from pipeline.runtime.command import raise_error
from pipeline.runtime.gpus import cuda_is_usable

HOST = "127.0.0.1"


def main() -> None:
    with user_errors():
        asked = parse(sys.argv[1:])
        run, config = open_run(__doc__, asked.run)
        check_port(asked.port)
        chat = open_chat(run, config)
        serve(chat, run, port=asked.port, share=asked.share)


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
    return parser.parse_args(arguments)


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


def serve(chat: Chat, run: Path, *, port: int | None, share: bool) -> None:
    """Show the page until Ctrl-C; raises `ConfigError` where no port is free."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    from pipeline.chat_page import CSS, make_page, make_theme

    page = make_page(chat, run)
    try:
        _, address, public = page.queue(max_size=20).launch(
            server_name=HOST,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            show_error=True,
            footer_links=[],
            theme=make_theme(),
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"no port for the page: {error}") from error
    print(f"Chat with {run}: {public or address}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
