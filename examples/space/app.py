"""Type a text, choose T and a schedule: what the spiking network makes of it, beside its ANN, and every spike of it.

`python app.py CHECKPOINT` (a folder, or a name on the Hub) serves the page at http://127.0.0.1:7860.
"""

import argparse
import os
import traceback
from dataclasses import dataclass
from functools import partial


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import matplotlib
import torch
import transformers


matplotlib.use("Agg")
from matplotlib.figure import Figure


matplotlib.rcParams["text.parse_math"] = False  # a token may be `$\foo$`

SHOWN_TOKENS, SHOWN_NEURONS = 12, 48
MOST_CHARACTERS = 20_000
INK, ACCENT = "#30343f", "#d1495b"


@dataclass
class Site:
    """What one neuron site did: spikes of shape `(T, S, D)`, zeros and ones."""

    name: str
    spikes: torch.Tensor

    @property
    def rate(self) -> float:
        return self.spikes.mean().item()


def load(checkpoint: str, revision: str | None):
    """Model and tokenizer of a checkpoint, by the Auto class that its configuration names for its own weights."""
    config = transformers.AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=True)
    references = getattr(config, "auto_map", None) or {}
    auto = next(
        (name for name, each in references.items() if each.endswith((config.architectures or ["none"])[0])), None
    )
    if auto is None:
        raise ValueError(f"`checkpoint` must be a FAS checkpoint, got {checkpoint!r} of type {config.model_type!r}.")
    options = {"revision": revision, "trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, **options)
    return getattr(transformers, auto).from_pretrained(checkpoint, **options).eval(), tokenizer


@torch.no_grad()
def watch(model, inputs) -> list[Site]:
    """Run the spiking network once and return every spike of every site, in the order the sites run in."""
    sites: list[Site] = []

    def record(name, neuron, arguments, output):
        trains = neuron.trains(arguments[0])
        sites.append(Site(name, (trains != 0).float()[:, 0].reshape(neuron.T, -1, neuron.width)))

    hooks = [neuron.register_forward_hook(partial(record, name)) for name, neuron in model.neurons()]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sites


def short_name(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {int(numbers[0]) + 1}" if numbers else "pooler" if "pooler" in name else "head"


def raster(sites: list[Site], tokens: list[str], T: int) -> Figure:
    """Spikes of the busiest neurons of every site over tokens and, within each, timesteps."""
    tokens = tokens[-SHOWN_TOKENS:]
    figure = Figure(figsize=(9, 0.8 * len(sites) + 0.9), layout="constrained")
    colours = matplotlib.colors.ListedColormap(["white", INK])
    for axes, site in zip(figure.subplots(len(sites), 1, squeeze=False)[:, 0], sites, strict=True):
        spikes = site.spikes[:, -len(tokens) :]
        busiest = spikes.sum((0, 1)).topk(min(SHOWN_NEURONS, spikes.shape[-1])).indices
        columns = spikes[..., busiest].transpose(0, 1).flatten(0, 1)  # (S·T, D)
        extent = (0, len(columns), 0, len(busiest))
        axes.imshow(columns.T.numpy(), colours, aspect="auto", interpolation="nearest", extent=extent, vmin=0, vmax=1)
        axes.set(xticks=range(0, len(columns), T), yticks=[])
        axes.grid(axis="x", color="#aab0bf", linewidth=0.8)
        axes.tick_params(labelbottom=False, length=0)
        axes.set_ylabel(short_name(site.name), rotation=0, ha="right", va="center", color=INK)
        for side in axes.spines.values():
            side.set_color("#d8dbe2")
        if len(columns) == len(tokens) * T:
            by_token = axes
    by_token.tick_params(which="minor", labelbottom=True, length=0)
    by_token.set_xticks([(i + 0.5) * T for i in range(len(tokens))], tokens, minor=True, fontsize=8)
    return figure


def rates(sites: list[Site]) -> Figure:
    """Share of neurons that spike in one timestep, by site."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([short_name(site.name) for site in sites], [site.rate for site in sites], color=ACCENT, width=0.6)
    axes.bar_label(bars, [f"{site.rate:.1%}" for site in sites], fontsize=9, color=INK, padding=2)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.set_ylabel("neurons that spike\nin a timestep", color=INK)
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


@torch.no_grad()
def answer(model, tokenizer, inputs, new_tokens: int):
    """What the model says in its present mode: label probabilities, or text, and the token ids to watch."""
    if model.can_generate():
        ids = model.generate(
            **inputs,
            max_new_tokens=int(new_tokens),
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.decode(ids[0], skip_special_tokens=True), ids
    logits = model(**inputs).logits[0]
    if logits.dim() == 2:  # masked LM
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        if len(places) == 0:
            raise gr.Error(f"Write {tokenizer.mask_token} where a word is to be filled in.")
        probabilities, best = logits[places[0, 0]].softmax(-1).topk(5)
        return {tokenizer.decode([i]): p for i, p in zip(best.tolist(), probabilities.tolist(), strict=True)}, None
    if len(logits) == 1:  # regression
        return {f"score {logits.item():.3f}": 1.0}, None
    names = model.config.id2label
    return {names[i]: p for i, p in enumerate(logits.softmax(-1).tolist())}, None


def positions(model) -> int:
    """Tokens that the model has positions for, generated ones included."""
    config = model.config
    if getattr(config, "granularity", None) == "position" and config.calib_T:
        return config.calib_length
    return config.max_position_embeddings + (getattr(getattr(config, "table", None), "positions", None) or 0)


def encoded(model, tokenizer, text: str, new_tokens: int):
    """The text as inputs of the model, and a note where not all of it fits."""
    if not text.strip():
        raise gr.Error("Write a text first.")
    if len(text) > MOST_CHARACTERS:
        raise gr.Error(f"The text must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}. Shorten it.")
    limit = positions(model) - int(new_tokens)
    if limit < 1:
        raise gr.Error(
            f"New tokens must be fewer than the {positions(model)} positions of the model, got {int(new_tokens)}."
        )
    found = len(tokenizer(text, verbose=False)["input_ids"])
    if found == 0:
        raise gr.Error("The text must have a token that the model knows, got none. Write another one.")
    note = f" **Only the first {limit} of {found} tokens fit, and were read.**" if found > limit else ""
    return tokenizer(text, return_tensors="pt", truncation=True, max_length=limit), note


def run(model, tokenizer, text: str, T: int, schedule: str, new_tokens: int = 0):
    """Outputs of the page: ANN, spiking network, raster, rates, one line of summary."""
    inputs, note = encoded(model, tokenizer, text, new_tokens)
    model.set_timesteps(0)
    ann, _ = answer(model, tokenizer, inputs, new_tokens)
    model.set_timesteps(int(T), schedule)
    spiking, ids = answer(model, tokenizer, inputs, new_tokens)
    if ids is not None:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sites = watch(model, inputs)
    tokens = [tokenizer.decode([i]).strip() or "·" for i in inputs["input_ids"][0].tolist()]
    same = "the same as" if spiking == ann or _first(spiking) == _first(ann) else "not the same as"
    spikes = sum(site.spikes.sum().item() for site in sites)
    rate = spikes / sum(site.spikes.numel() for site in sites)
    summary = f"**{spikes:,.0f} spikes**, {rate:.2%} of what could have spiked. The answer is {same} the ANN's.{note}"
    return ann, spiking, raster(sites, tokens, int(T)), rates(sites), summary


def _first(outcome):
    return max(outcome, key=outcome.get) if isinstance(outcome, dict) else outcome


def page(model, tokenizer, name: str) -> gr.Blocks:
    generates = model.can_generate()
    example = "The old house stood at the end of the" if generates else "A warm, funny and moving film."
    if model.config.architectures[0].endswith("ForMaskedLM"):
        example = f"The capital of France is {tokenizer.mask_token}."
    outcome = partial(gr.Textbox, lines=5) if generates else partial(gr.Label, num_top_classes=5)
    with gr.Blocks(title="FAS: a spiking language model") as blocks:
        gr.Markdown(f"# A spiking language model, spike by spike\n`{name}`, its quantised ANN, and what fires in it.")
        with gr.Row():
            with gr.Column(scale=2):
                text = gr.Textbox(example, label="Text", lines=4)
                T = gr.Slider(1, 16, value=model.config.calib_T or 4, step=1, label="T, timesteps")
                schedule = gr.Radio(["stepwise", "layerwise"], value=model.config.schedule, label="Schedule")
                length = gr.Slider(1, 60, value=20, step=1, label="New tokens", visible=generates)
                button = gr.Button("Run", variant="primary")
            with gr.Column(scale=3):
                ann = outcome(label="ANN (T = 0)")
                spiking = outcome(label="Spiking network")
                summary = gr.Markdown()
        gr.Markdown(
            f"### Every spike\nThe last {SHOWN_TOKENS} tokens, and the busiest {SHOWN_NEURONS} neurons of each site, "
            "one row each; between two lines lie the T timesteps of one token."
        )
        raster_plot = gr.Plot(show_label=False)
        gr.Markdown("### Spike rate by site")
        rate_plot = gr.Plot(show_label=False)
        inputs = [text, T, schedule] + ([length] if generates else [])
        button.click(partial(run, model, tokenizer), inputs, [ann, spiking, raster_plot, rate_plot, summary])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=os.environ.get("FAS_CHECKPOINT"), help="folder or Hub name")
    parser.add_argument("--revision", default=os.environ.get("FAS_REVISION"), help="commit to pin")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not args.checkpoint:
        parser.error("give a checkpoint, or set FAS_CHECKPOINT")
    try:
        model, tokenizer = load(args.checkpoint, args.revision)
    except (OSError, ValueError) as error:
        if args.debug:
            traceback.print_exc()
        parser.error(f"`checkpoint` must be one that loads, got {args.checkpoint!r}: {error}")
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page(model, tokenizer, args.checkpoint.rstrip("/").rpartition("/")[2]).launch(server_port=args.port, theme=theme)


if __name__ == "__main__":
    main()
