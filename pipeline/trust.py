"""Whether a run may be opened: its reward may be code, or a server that gets every text."""

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config, ConfigError
from pipeline.rewards.terms import TOKEN_VARIABLE, Term, parse_terms


def code_and_servers(terms: Sequence[Term]) -> tuple[list[str], list[str]]:
    """The functions, as `module:function`, and the servers' addresses that a reward names."""
    return tuple([term.source for term in terms if term.kind == kind] for kind in ("function", "remote"))


def check_trust(folder: Path, config: Config, *, trusted: bool) -> None:
    """Raise `ConfigError` where a run's reward is code or a server, unless whoever opens the run trusts it.

    A run may come from others; a recipe that one trains oneself is one's own word.
    """
    code, servers = code_and_servers(parse_terms(config.reward.reward))
    if trusted or not (code or servers):
        return
    told = []
    if code:
        told.append(f"runs the code of {', '.join(code)}, which may be a file in this folder")
    if servers:
        token = f" and {TOKEN_VARIABLE}" if os.environ.get(TOKEN_VARIABLE) else ""
        told.append(f"sends every text{token} to {', '.join(servers)}")
    raise ConfigError(
        f"the reward of {folder} {' and '.join(told)}. If you know what that is, add --trust: what a run of others "
        f"runs is theirs to say."
    )
