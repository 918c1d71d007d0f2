"""The page of `pipeline.chat`: what is typed and turned, and both models' continuations side by side."""

import html
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from pipeline.chatting import Chat, Continuation, Sides
from pipeline.errors import UserError
from pipeline.foreign_text import shown

OPENINGS = ["This movie", "I watched it because", "The story is", "My wife and I", "The worst thing about"]
WAITING = "Waiting for the models: they continue one opening at a time."
LONGEST = 256  # tokens, where the model's context allows as many

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#results, #results > * { padding: 0 !important; }
.pairs { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.cell { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
        background: var(--block-background-fill); overflow-wrap: anywhere; }
.cell.tuned { border-left: 4px solid var(--color-accent); }
.cell.original { border-left: 4px solid var(--neutral-400); }
.cell header { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 0.85em; margin-bottom: 6px; }
.cell p { white-space: pre-wrap; margin: 0; font-size: 1.05em; line-height: 1.5; }
.cell .opening { opacity: 0.65; }
.figure { font-variant-numeric: tabular-nums; }
.cell.means { background: var(--background-fill-secondary); }
.cell.means header { margin: 0; }
.message { border-left: 4px solid var(--color-accent); padding: 10px 14px; }
@media (max-width: 640px) {
  .pairs { grid-template-columns: 1fr; gap: 6px; }
  .pairs .tuned { margin-bottom: 12px; }
}
"""


def make_theme() -> gr.Theme:
    """Fonts of the reader's own machine: the default theme's come from the network."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def make_page(chat: Chat, run: Path) -> gr.Blocks:
    """The page over the models of `run`; one request at a time, the others wait and are told so."""
    rollout = chat.config.rollout
    longest = min(LONGEST, (chat.context or LONGEST + 1) - 1)

    def respond(opening: str, temperature: float, tokens: int, samples: int, turn: int) -> Iterator[tuple[str, int]]:
        try:
            for sides in chat.continue_opening(
                opening, temperature=temperature, tokens=int(tokens), samples=int(samples), turn=turn
            ):
                yield pairs(opening.rstrip(), sides), turn + 1
        except UserError as error:
            yield message(str(error)), turn

    with gr.Blocks(title=f"Chat with {run}", analytics_enabled=False) as page:
        gr.HTML(introduction(chat, run))
        opening = gr.Textbox(
            label="Opening", placeholder="The beginning of a text", max_lines=4, max_length=chat.longest_opening,
            elem_id="opening",
        )  # fmt: skip
        gr.Examples(OPENINGS, opening, label="For example", api_visibility="private")
        with gr.Row():
            temperature = gr.Slider(0.1, 2, rollout.temperature, step=0.05, label="Temperature", min_width=240)
            tokens = gr.Slider(
                1, longest, min(rollout.response_max_tokens, longest), step=1, label="Length, tokens", min_width=240
            )
            samples = gr.Slider(1, 8, 1, step=1, label="Samples", min_width=240)
        button = gr.Button("Continue", variant="primary", elem_id="continue")
        results = gr.HTML(elem_id="results", padding=False)
        turn = gr.State(0)
        asked = gr.on([button.click, opening.submit], lambda: message(WAITING), outputs=results, queue=False,
                      show_progress="hidden", api_visibility="private")  # fmt: skip
        asked.then(
            respond,
            [opening, temperature, tokens, samples, turn],
            [results, turn],
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def introduction(chat: Chat, run: Path) -> str:
    """What the page shows, and of which run: its settings are text, whatever they hold."""
    base, rewards = (
        html.escape(shown(text)) for text in (chat.config.model.model_path, ", ".join(chat.config.reward.reward))
    )
    return (
        f"<h2>Before and after: {html.escape(str(run))}</h2>"
        f"<p><code>{base}</code> and the {'LoRA adapter' if chat.reference.is_shared else 'model'} PPO made of it "
        f"continue your opening with the same sampling noise. The score is what the run rewards ({rewards}); KL is how "
        f"much likelier the tuned model finds its text than the original does, in nats.</p>"
    )


def message(text: str) -> str:
    """What is said where the continuations would be."""
    return f'<p class="message" role="status">{html.escape(shown(text))}</p>'


def pairs(opening: str, sides: Sides) -> str:
    """Both sides as HTML, a row a sample; the means above where there are several, once they have their figures."""
    cells = []
    sides_named = {"original": ("Original", sides.original), "tuned": ("Tuned", sides.tuned)}
    if len(sides.original) > 1 and sides.original[0].scores is not None:
        cells += [
            f'<div class="cell means {kind}"><header><b>{name}, mean of {len(texts)}</b>{_figures(_mean(texts))}'
            f"</header></div>"
            for kind, (name, texts) in sides_named.items()
        ]
    for i in range(len(sides.original)):
        for kind, (name, texts) in sides_named.items():
            cells.append(
                f'<article class="cell {kind}"><header><b>{name}</b>{_figures(texts[i])}</header>'
                f'<p><span class="opening">{html.escape(opening)}</span>{html.escape(texts[i].text)}</p></article>'
            )
    fault = sides.original[0].fault
    return f'{message(fault) if fault else ""}<div class="pairs">{"".join(cells)}</div>'


def _figures(continuation: Continuation) -> str:
    if continuation.scores is None:
        return ""
    figures = {**{name: f"{value:.3f}" for name, value in continuation.scores.items()}, "KL": f"{continuation.kl:.2f}"}
    return "".join(f'<span class="figure">{html.escape(name)} {value}</span>' for name, value in figures.items())


def _mean(texts: list[Continuation]) -> Continuation:
    scores = {name: sum(text.scores[name] for text in texts) / len(texts) for name in texts[0].scores}
    return Continuation("", scores, sum(text.kl for text in texts) / len(texts))
