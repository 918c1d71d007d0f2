"""The chat: both models as the evaluation would sample and judge them, and the real page in a real browser."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from chromium import start
from launching import ROOT, interruptible, run_here
from playwright.sync_api import Page, sync_playwright

from pipeline.assembly import open_run
from pipeline.chat import main as chat_main
from pipeline.chat import open_chat, parse
from pipeline.chat_page import pairs
from pipeline.chatting import Chat, ChatError
from pipeline.models.loading import load_causal_lm
from pipeline.rewards.protocol import RewardError
from pipeline.rewards.sentiment import SentimentReward
from pipeline.rollout.decoding import decode
from pipeline.rollout.sampling import SamplingOptions, sampling_noise


@pytest.fixture(scope="module")
def run(lora_run):
    return lora_run


@pytest.fixture(scope="module")
def chat(run) -> Chat:
    return open_chat(*open_run("", str(run)))


def continued(chat: Chat, opening: str = "the film", **settings):
    return list(chat.continue_opening(opening, **{"temperature": 1.0, "tokens": 10, "samples": 3} | settings))


def test_lora_keeps_the_base_once(chat):
    assert chat.reference.is_shared and chat.reference._model is chat.policy.model


def test_a_checkpoint_of_the_last_step_chats_as_the_run(run, chat):
    checkpoint = open_chat(*open_run("", str(run / "checkpoints/step_000003")))
    assert continued(checkpoint)[-1] == continued(chat)[-1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_sides_are_samples_of_their_model_with_the_same_noise(chat, tiny_lm, temperature):
    sides = continued(chat, temperature=temperature)[-1]
    ids = torch.tensor([chat.tokenizer("the film").input_ids] * 3)
    tokens = chat.tokenizer
    for model, texts in ((load_causal_lm(tiny_lm), sides.original), (chat.policy.model, sides.tuned)):
        noise, lengths = sampling_noise(0, 0, 3, 10, 10)
        whole = decode(
            model, ids, torch.ones_like(ids), noise, lengths, eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id, options=SamplingOptions(temperature),
        )  # fmt: skip
        expected = [tokens.decode(row, skip_special_tokens=True) for row in torch.cat([ids, whole.tokens], 1)]
        assert [f"the film{text.text}" for text in texts] == expected
    assert [text.text for text in sides.original] != [text.text for text in sides.tuned]


def test_scores_are_the_runs_reward_and_kl_is_that_of_plain_log_probs(chat, tiny_lm, tiny_classifier):
    sides = continued(chat, temperature=0.7)[-1]
    reward = SentimentReward(tiny_classifier, scale="probability")
    for texts in (sides.original, sides.tuned):
        expected = reward(["the film"] * 3, [text.text for text in texts]).tolist()
        assert [text.scores["probability"] for text in texts] == pytest.approx(expected, abs=1e-5)
    assert [text.kl for text in sides.original] == [0, 0, 0]
    start = len(chat.tokenizer("the film").input_ids)
    original = load_causal_lm(tiny_lm)
    noise, lengths = sampling_noise(0, 0, 3, 10, 10)
    ids = torch.tensor([chat.tokenizer("the film").input_ids] * 3)
    sampled = decode(chat.policy.model, ids, torch.ones_like(ids), noise, lengths, options=SamplingOptions(0.7),
                     eos_token_id=chat.tokenizer.eos_token_id, pad_token_id=chat.tokenizer.pad_token_id)  # fmt: skip
    tokens = torch.cat([ids, sampled.tokens], 1)
    with torch.no_grad():
        p, q = (
            (model(tokens).logits[:, start - 1 : -1] / 0.7).log_softmax(-1).gather(2, sampled.tokens.unsqueeze(2))
            for model in (chat.policy.model, original)
        )
    expected = ((p - q).squeeze(2) * sampled.mask).sum(1).tolist()
    assert [text.kl for text in sides.tuned] == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, expected)) > 0.1


def test_texts_grow_token_by_token_and_figures_come_at_the_end(chat):
    *growing, last = continued(chat)
    assert 2 < len(growing) <= 10
    for before, after in zip(growing, [*growing[1:], last], strict=True):
        for one, two in zip(before.original + before.tuned, after.original + after.tuned, strict=True):
            assert two.text.startswith(one.text) and one.scores is None and one.kl is None
    assert all(text.scores is not None and text.kl is not None for text in last.original + last.tuned)


def test_another_turn_has_other_noise_and_the_same_turn_the_same(chat):
    first, again, second = (continued(chat, turn=turn)[-1] for turn in (0, 0, 1))
    assert first == again and first != second


def test_where_the_reward_fails_the_texts_and_their_kl_stay(chat, monkeypatch):
    whole = continued(chat)[-1]

    def failing(self, prompts, responses, reading):
        raise RewardError("the reward server <down> did not answer")

    monkeypatch.setattr("pipeline.rewards.composed.ComposedReward.measures", failing)
    last = continued(chat)[-1]
    assert [(text.text, text.kl) for text in last.tuned] == [(text.text, text.kl) for text in whole.tuned]
    assert last.tuned[0].scores == {} and "did not answer" in last.tuned[0].fault
    shown = pairs("the film", last)
    assert "the reward server &lt;down&gt; did not answer" in shown and shown.count("<article") == 6
    assert f"KL</b> {last.tuned[0].kl:.2f}" in shown or f"KL {last.tuned[0].kl:.2f}" in shown


def test_who_leaves_in_mid_text_leaves_the_models_as_they_were(chat):
    before = continued(chat)[-1]
    left = chat.continue_opening("the film", temperature=1.0, tokens=10, samples=2)
    next(left)
    interleaved = continued(chat)[-1]  # while the other is neither finished nor closed
    left.close()
    assert interleaved == before == continued(chat)[-1]


@pytest.mark.parametrize("opening", ["", "  \n"])
def test_an_empty_opening_is_refused(chat, opening):
    with pytest.raises(ChatError, match="Type the beginning of a text first"):
        continued(chat, opening)


def test_an_opening_too_long_for_the_model_is_refused_with_the_numbers(chat):
    with pytest.raises(ChatError, match=r"has 60 tokens and the continuation up to 10: together 70, and .* 64 at most"):
        continued(chat, chat.tokenizer.eos_token * 60)


def test_a_taken_port_and_a_folder_that_is_no_run_are_one_line(run, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_here(chat_main, run, "--port", port) == 2
    assert f"--port {port} cannot be used: " in capsys.readouterr().err
    assert run_here(chat_main, tmp_path) == 2
    assert "is not a run: it has no config.yaml" in capsys.readouterr().err


def test_nothing_is_shared_unless_asked_for():
    assert parse(["run"]).share is False and parse(["run", "--share"]).share is True


@pytest.fixture(scope="module")
def address(run):
    """Of the real command's page, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pipeline.chat", str(run), "--port", str(port)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=interruptible,
    ) as server:
        line = server.stdout.readline()
        try:
            assert f"http://127.0.0.1:{port}/" in line, line + server.stdout.read()
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                said, _ = server.communicate(timeout=30)
            finally:
                server.kill()  # or a server that does not end would be waited for
            assert "Traceback" not in said


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = start(playwright)
        yield browser
        browser.close()


def opened(browser, address: str) -> tuple[Page, list[str], list[str]]:
    """A page of its own session, the addresses it asks for, what its console complains of."""
    page, asked, complaints = browser.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    return page, asked, complaints


def watch_results(page: Page) -> None:
    """From now on keep every text of the results in `window.seen`."""
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => "
        "window.seen.push(document.querySelector('#results')?.textContent ?? ''))"
        ".observe(document.body, {childList: true, subtree: true, characterData: true}); }"
    )


def ask(page: Page, opening: str) -> None:
    page.get_by_label("Opening").fill(opening)
    page.get_by_role("button", name="Continue").click()


def printable(text: str) -> str:
    """Without what HTML cannot hold: the tiny model writes such characters."""
    return re.sub(r"[\x00-\x1f]", "", text)


def test_the_page_continues_an_opening_on_both_sides_with_scores_and_kl_and_loads_nothing_else(address, browser, chat):
    page, asked, complaints = opened(browser, address)
    page.get_by_label("Samples").first.fill("2")
    other, *_ = opened(browser, address)  # two at once: one waits for the other
    watch_results(other)
    ask(page, "the film")
    ask(other, "a good story")
    for where in (page, other):
        where.locator(".tuned .figure").first.wait_for()
    expected = continued(chat, samples=2)[-1]
    for kind, texts in (("original", expected.original), ("tuned", expected.tuned)):
        cells = page.locator(f"article.{kind}")
        assert cells.count() == 2 and page.locator(f".means.{kind}").count() == 1
        for cell, text in zip(cells.all(), texts, strict=True):
            assert printable(cell.locator("p").text_content()) == printable(f"the film{text.text}")
            figures = [f"probability {text.scores['probability']:.3f}", f"KL {text.kl:.2f}"]
            assert cell.locator(".figure").all_text_contents() == figures
    alone = continued(chat, "a good story", samples=1)[-1]
    assert printable(other.locator("article.tuned p").text_content()) == printable(f"a good story{alone.tuned[0].text}")
    assert other.locator(".means").count() == 0
    assert any("they continue one opening at a time" in text for text in other.evaluate("window.seen"))
    assert any("a good story" in text and "KL" not in text for text in other.evaluate("window.seen"))  # as it grew
    assert len(asked) > 10 and all(re.match(f"{address}|data:|blob:", url) for url in asked), asked
    assert complaints == []


def test_the_page_says_what_is_wrong_with_an_opening(address, browser):
    page, *_ = opened(browser, address)
    ask(page, "")
    page.get_by_text("Type the beginning of a text first").wait_for()
    ask(page, "the film " * 60)
    page.get_by_text("Shorten one of them").wait_for()
    ask(page, "the <b>film</b> ${6 * 7} {{value}}")
    page.locator(".tuned .figure").first.wait_for()
    assert "the <b>film</b> ${6 * 7} {{value}}" in page.locator("article.tuned p").text_content()
