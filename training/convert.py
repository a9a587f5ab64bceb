"""All steps of a conversion with one command: from a stock checkpoint to a folder that can be published.

    python -m training.convert MODEL --sites all --code phase --T 5 --calibration_file FILE --output_dir OUT

converts without training (`training.untrained`); without --sites and --code it is the published method:

    python -m training.convert RECIPE.yaml [--flag value …] [--step.flag value …]
    python -m training.convert --model_name_or_path MODEL --task_name sst2 --output_dir outputs/sst2

Steps that are finished are skipped; one that was killed goes on from its last complete checkpoint.
"""

import importlib
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configuration_fas import FASConfig

from . import untrained
from .arguments import check_writable, read_yaml, require_model_type, to_flags
from .checkpoints import checkpoints, remove_checkpoints
from .commands import only_run, run_command, show_messages
from .results import flat, markdown_table, plain, read_results, write_json, write_results
from .runner import RESULTS_FILE
from .untrained import SUMMARY_FILE


logger = logging.getLogger("training.convert")

RECIPES = Path(__file__).parent / "recipes"
SCRIPTS = ("run_clm", "run_mlm", "run_glue")
STEP_FILE = "step.json"
# Flags that describe the task: the corpus of a step `full` is its own, set with --full.dataset_name and the like.
TASK_FLAGS = {"dataset_name", "dataset_config_name", "train_file", "validation_file", "task_name", "text_columns"}
TASK_FLAGS |= {"label_column", "eval_split", "max_train_samples", "max_eval_samples", "max_seq_length", "block_size"}
RECIPE_KEYS = {"output_dir", "launcher", "shared", "steps"}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Convert without training, or run a recipe; returns the rows of all evaluations, each with its `step`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if untrained.is_meant(given):
        return untrained.main(given)
    recipe, flags = read_recipe(given)
    output_dir = Path(flags.pop("output_dir", recipe.get("output_dir", "")))
    steps = plan(recipe, flags, output_dir)
    check_writable(str(output_dir))
    rows, ran = [], False
    with only_run(output_dir):
        for name, script, settings in steps:
            ran |= run_step(name, script, settings, recipe.get("launcher"), start_changed=ran)
            found = read_results(Path(settings["output_dir"]) / RESULTS_FILE)["metrics"]["rows"]
            rows += [{"step": name, **row} for row in found]
        configuration = {name: {"script": script, **settings} for name, script, settings in steps}
        command = ["python", "-m", "training.convert", *given]
        write_results(output_dir / SUMMARY_FILE, metrics={"rows": rows}, configuration=configuration, command=command)
    logger.info("%s\n\nThe model is in %s", markdown_table([flat(row) for row in rows]), steps[-1][2]["output_dir"])
    return rows


def read_recipe(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe and the flags beside it; without a file, the recipe for the kind of model."""
    named = bool(argv) and not argv[0].startswith("--")
    flags = read_flags(argv[1:] if named else argv)
    if named:
        path = Path(argv[0])
        recipe = read_yaml(path if path.is_file() or path.suffix else RECIPES / f"{argv[0]}.yaml")
    else:
        model = flags.get("model_name_or_path")
        if model is None:
            raise ValueError("`--model_name_or_path` is required where no recipe is given.")
        try:
            require_model_type(FASConfig.get_config_dict(model)[0])
            causal = FASConfig.from_pretrained(model).table.causal
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`--model_name_or_path` must be a checkpoint that can spike, got {model!r}: {error}"
            ) from error
        recipe = read_yaml(RECIPES / ("decoder.yaml" if causal else "encoder.yaml"))
    unknown = recipe.keys() - RECIPE_KEYS
    if unknown or not isinstance(recipe.get("steps"), dict):
        raise ValueError(
            f"A recipe must have `steps` and may have {', '.join(sorted(RECIPE_KEYS))}, got {list(recipe)}."
        )
    return recipe, flags


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Read `--flag value …` into a mapping; one without a value is true, one with several a list."""
    flags: dict[str, Any] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
            flags[name] = [value] if value else []
        elif not name:
            raise ValueError(f"Flags must start with `--`, got {token!r}.")
        else:
            flags[name].append(token)
    return {name: values[0] if len(values) == 1 else values or True for name, values in flags.items()}


def plan(recipe: dict[str, Any], flags: dict[str, Any], output_dir: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Return `(name, script, settings)` of each step: shared settings, its own, then the flags.

    Each step starts from what the one before it made, unless the recipe names its model.
    """
    if not output_dir.name:
        raise ValueError("`--output_dir` is required, here or in the recipe.")
    odd = [name for name in recipe["steps"] if not re.fullmatch(r"\w[\w-]*", str(name))]
    if odd:
        raise ValueError(
            f"`steps` must have names of letters, digits, _ and -, each a folder below --output_dir, got {odd[0]!r}."
        )
    names = flags.pop("steps", list(recipe["steps"]))
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in recipe["steps"]]
    unknown += [flag for flag in flags if "." in flag and flag.split(".")[0] not in recipe["steps"]]
    if unknown:
        raise ValueError(f"`--steps` must be among {', '.join(recipe['steps'])}, got {', '.join(unknown)}.")
    steps = []
    shared = dict(recipe.get("shared") or {})
    model = flags.pop("model_name_or_path", shared.pop("model_name_or_path", None))
    for name in names:
        own = dict(recipe["steps"][name])
        script = own.pop("script", None)
        if script not in SCRIPTS:
            raise ValueError(f"`script` of step {name!r} must be one of {', '.join(SCRIPTS)}, got {script!r}.")
        corpus = script == "run_mlm" or own.get("stage") == "full"
        general = {key: value for key, value in flags.items() if "." not in key}
        general = {key: value for key, value in general.items() if not (corpus and key in TASK_FLAGS)}
        special = {key.partition(".")[2]: value for key, value in flags.items() if key.partition(".")[0] == name}
        settings = {"do_train": True, "do_eval": True, **shared, **own, **general, **special}
        if model is not None and "model_name_or_path" not in {**own, **special}:
            settings["model_name_or_path"] = model
        if settings.get("stage") == "baseline" or str(settings["do_eval"]).lower() == "false":
            settings.pop("T", None)
        settings["output_dir"] = str(output_dir / name)
        model = settings["output_dir"]
        steps.append((name, script, settings))
    return steps


def run_step(
    name: str, script: str, settings: dict[str, Any], launcher: list[str] | None, *, start_changed: bool = False
) -> bool:
    """Run a step unless it is finished; returns whether it ran.

    Raises:
        ValueError: if its folder holds a finished step with other settings, or one from a model that was made anew
            since. (What an interrupted one may change, its checkpoints know.)
    """
    folder = Path(settings["output_dir"])
    mark = folder / STEP_FILE
    found: dict[str, Any] = read_results(mark) if mark.is_file() else {"settings": settings, "finished": False}
    changed = sorted(
        key
        for key in (found["settings"].keys() | settings.keys()) - {"allow_changed_resume"}
        if str(plain(found["settings"]).get(key)) != str(plain(settings).get(key))  # of secrets neither has the value
    )
    if changed and found["finished"]:
        raise ValueError(
            f"`--output_dir` must not hold step {name!r} with other settings, got {str(folder)!r}, where "
            f"{', '.join(changed)} differ. Remove that folder, or choose another --output_dir."
        )
    if start_changed and (found["finished"] or checkpoints(folder)):
        raise ValueError(
            f"`--output_dir` must not hold step {name!r} from an earlier model, got {str(folder)!r}, while the step "
            "before it was run anew. Remove that folder."
        )
    if found["finished"]:
        logger.info("Step %s is finished: skipped.", name)
        return False
    logger.info("Step %s: %s", name, script)
    write_json(mark, {"settings": settings, "finished": False})
    flags = to_flags({**settings, "resume_from_checkpoint": True})
    if launcher:
        subprocess.run([*launcher, f"training.{script}", *flags], check=True)
    else:
        importlib.import_module(f"training.{script}").main(flags)
    write_json(mark, {"settings": settings, "finished": True})
    remove_checkpoints(folder)
    return True


def command(argv: Sequence[str]) -> int:
    """As [`main`], with help, and messages for errors; returns the exit status."""
    if {"-h", "--help"} & {*argv}:
        untrained.make_parser(sorted(path.stem for path in RECIPES.glob("*.yaml"))).print_help()
        return 0
    memory = "Fewer --tokens, a lower --limit, a smaller batch or a smaller model need less."
    return run_command(main, "Not converted", argv, memory=memory)


if __name__ == "__main__":
    show_messages()
    sys.exit(command(sys.argv[1:]))
