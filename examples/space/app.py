"""Type a text, choose T and a schedule: what the spiking network makes of it, beside the stock one, and its spikes.

`python app.py CHECKPOINT` (a folder, or a name on the Hub) serves the page at http://127.0.0.1:7860.
"""

import argparse
import os
import traceback
from functools import partial
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from network import cost, load, reference, watch
from pictures import answers, heat, numbers, raster


MOST_CHARACTERS = 20_000
KINDS = {
    "qkv": "into queries, keys and values",
    "query": "queries",
    "value": "values",
    "attention output": "into the attention's output",
    "mlp in": "into the MLP",
    "mlp out": "inside the MLP",
    "head": "into the head",
}
SCHEDULES = {
    "layerwise": "layerwise: each layer runs its T timesteps, then the next one begins",
    "stepwise": "stepwise: every timestep runs through the whole network",
    "accumulated": "accumulated: as stepwise, but norms and attention see averages so far",
}
CODES = {
    "rate": "**Code, rate**: a value is how often a neuron spikes in T timesteps.",
    "phase": "**Code, phase**: a value is a binary number, one spike or none for each digit, the largest first.",
    "first_spike": "**Code, first spike**: a value is when a neuron spikes, at most once; the sooner, the larger.",
}
EXAMPLES = {
    "generate": ["The old house stood at the end of the", "Water boils at", "My favourite food is"],
    "classify": ["A warm, funny and moving film.", "Two hours I will never get back.", "Not bad, not good either."],
    "fill": ["The capital of France is {mask}.", "She plays the {mask} very well.", "The cat sat on the {mask}."],
}


@torch.no_grad()
def answer(model: Any, tokenizer: Any, inputs: Any, new_tokens: int) -> tuple[Any, Any]:
    """What the model says in its present mode: text after the prompt, or labels with their shares; and all ids."""
    if model.can_generate():
        ids = model.generate(
            **inputs,
            max_new_tokens=int(new_tokens),
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), ids
    logits = model(**inputs).logits[0]
    if logits.dim() == 2:  # masked LM
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        if len(places) == 0:
            raise gr.Error(f"Write {tokenizer.mask_token} where a word is to be filled in.")
        logits = logits[places[0, 0]]
        tokens = tokenizer.convert_ids_to_tokens(range(len(logits)))
        names = [token or f"token {i}" for i, token in enumerate(tokens)]  # a vocabulary may be padded
    elif len(logits) == 1:  # regression
        return {f"score {logits.item():.3f}": 1.0}, None
    else:
        names = [model.config.id2label[i] for i in range(len(logits))]
    shares, best = logits.softmax(-1).topk(min(5, len(logits)))
    return {names[i]: share for i, share in zip(best.tolist(), shares.tolist(), strict=True)}, None


def positions(model: Any) -> int:
    """Tokens that the model has positions for, generated ones included."""
    config = model.config
    if getattr(config, "granularity", None) == "position" and config.calib_T:
        return config.calib_length
    return config.max_position_embeddings + (getattr(getattr(config, "table", None), "positions", None) or 0)


def encoded(model: Any, tokenizer: Any, text: str, new_tokens: int) -> tuple[Any, str]:
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


def run(model: Any, tokenizer: Any, text: str, T: int, schedule: str, new_tokens: int = 0) -> tuple:
    """What the page shows: answers, a line of summary, numbers, spike rates; and what a raster is drawn from."""
    T, name = int(T), reference(model)
    inputs, note = encoded(model, tokenizer, text, new_tokens)
    with model.running(0):
        stock, _ = answer(model, tokenizer, inputs, new_tokens)
    with model.running(T, schedule):
        spiking, ids = answer(model, tokenizer, inputs, new_tokens)
        if ids is not None:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = watch(model, inputs)
    read = inputs["input_ids"][0].tolist()
    tokens = [tokenizer.decode([i]).strip() or "·" for i in read]
    same = stock == spiking or (isinstance(stock, dict) and next(iter(stock)) == next(iter(spiking)))
    summary = f"The spiking network's answer is **{'the same as' if same else 'not'}** the {name}'s.{note}"
    prompt = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    prompt = prompt.removesuffix(spiking) if isinstance(spiking, str) else ""
    titles = f"{name[0].upper()}{name[1:]}, T = 0", f"Spiking network, T = {T}, {schedule}"
    shown = answers(prompt, stock, spiking, titles)
    costs = numbers(T, found, cost(model, found, len(read), T, schedule), name)
    return shown, summary, costs, heat(found, tokens), {label(site): site for site in found}, tokens


def label(site: Any) -> str:
    """A site, as the page names it."""
    kind = KINDS.get(site.kind, site.kind)
    return kind if site.layer is None else f"layer {site.layer + 1}: {kind}"


def draw(found: dict[str, Any], tokens: list[str], chosen: str) -> str:
    """The raster of the chosen site."""
    return raster(found[chosen], tokens)


def examples(model: Any, tokenizer: Any) -> list[str]:
    """Texts to begin with, of the kind that the model answers."""
    if model.can_generate():
        return EXAMPLES["generate"]
    if type(model).__name__.endswith("ForMaskedLM"):
        return [each.format(mask=tokenizer.mask_token) for each in EXAMPLES["fill"]]
    return EXAMPLES["classify"]


def page(model: Any, tokenizer: Any, name: str) -> gr.Blocks:
    """The page, with the answer to its first example in it."""
    config, texts, generates = model.config, examples(model, tokenizer), model.can_generate()
    T, schedule = config.T or config.calib_T or 4, config.schedule
    *first, found, tokens = run(model, tokenizer, texts[0], T, schedule, 20 if generates else 0)
    inside = [each for each, site in found.items() if site.kind == "mlp out"] or list(found)
    chosen = inside[len(inside) // 2]
    with gr.Blocks(title="FAS: a spiking language model") as blocks:
        gr.Markdown(
            f"# A spiking language model, spike by spike\n`{name}` answers twice: as the {reference(model)}, and with "
            "the same weights as a network whose neurons only spike or do not. <mark class='fas-key'>Marked</mark>: "
            "where the two differ."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(texts[0], label="Text", lines=3)
                button = gr.Button("Run", variant="primary")
                offered = gr.Examples(texts, text, label="Examples: click to run")
                hint = "how many timesteps a neuron has to say a value; more are more exact, and more spikes"
                steps = gr.Slider(1, 16, value=T, step=1, label="T", info=hint)
                choices = [(SCHEDULES[each], each) for each in config.schedules]
                hint = "in what order time and layers pass"
                order = gr.Radio(choices, value=schedule, label="Schedule", info=hint)
                gr.Markdown(CODES[config.code])
                length = gr.Slider(1, 60, value=20, step=1, label="New tokens", visible=generates)
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(first[0])
                summary = gr.Markdown(first[1])
                costs = gr.HTML(first[2])
        gr.Markdown("### How many neurons spike")
        rates = gr.HTML(first[3])
        gr.Markdown("### Spikes, one by one")
        site = gr.Dropdown(list(found), value=chosen, label="Where", interactive=True)
        drawn = gr.HTML(draw(found, tokens, chosen))
        kept, words = gr.State(found), gr.State(tokens)
        inputs = [text, steps, order] + ([length] if generates else [])
        outputs = [shown, summary, costs, rates, kept, words]
        for start in (button.click, text.submit, offered.load_input_event.then):
            done = start(partial(run, model, tokenizer), inputs, outputs)
            done.then(draw, [kept, words, site], drawn, show_progress="hidden")
        site.change(draw, [kept, words, site], drawn, show_progress="hidden")
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=os.environ.get("FAS_CHECKPOINT"), help="folder or Hub name")
    parser.add_argument("--revision", default=os.environ.get("FAS_REVISION"), help="commit to pin")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
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
