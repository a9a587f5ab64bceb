"""All steps of a conversion with one command: from a stock checkpoint to a folder that can be published.

    fas convert MODEL --sites all --code phase --T 5 --calibration_file FILE --output_dir OUT

converts without training (`training.untrained`); on data of one's own, or a task, it is the published method:

    fas convert MODEL --task_name sst2 --output_dir outputs/sst2
    fas convert RECIPE [--flag value …] [--step.flag value …]

Without a recipe the long step on a large corpus is left out. Steps that are finished are skipped; one that was killed
goes on from its last complete checkpoint. The same as `python -m training.convert`.
"""

import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configuration_fas import FASConfig

from . import untrained
from .arguments import (
    DATA_SOURCES,
    DataArguments,
    FASTrainingArguments,
    ModelArguments,
    check_writable,
    parse_flags,
    read_fields,
    read_yaml,
    require_model_type,
    to_flags,
    without_other_data,
)
from .checkpoints import SCRATCH, checkpoints, remove_checkpoints
from .commands import UsageError, only_run, run_command, show_messages
from .results import flat, markdown_table, plain, read_results, write_json, write_results
from .runner import RESULTS_FILE, check_arguments
from .untrained import SUMMARY_FILE


logger = logging.getLogger("training.convert")

RECIPES = Path(__file__).parent / "recipes"
SCRIPTS = ("run_clm", "run_mlm", "run_glue")
STEP_FILE = "step.json"
# Flags that describe the task: the corpus of a step `full` is its own, set with --full.dataset_name and the like.
TASK_FLAGS = {"dataset_name", "dataset_config_name", "train_file", "validation_file", "task_name", "text_columns"}
TASK_FLAGS |= {"label_column", "eval_split", "max_train_samples", "max_eval_samples", "max_seq_length", "block_size"}
RECIPE_KEYS = {"output_dir", "launcher", "shared", "steps", "default_steps"}
# Flags of a step that its weights do not depend on: those that evaluate, and those that only show or save.
EVALUATES = {"T", "max_eval_samples", "per_device_eval_batch_size"}
CHOOSES_EVALUATION = {"do_eval", "eval_split", "validation_file"}
SHOWS = {"logging_dir", "logging_steps", "logging_strategy", "report_to", "run_name", "disable_tqdm"}
SHOWS |= {"save_steps", "save_strategy", "save_total_limit", "allow_changed_resume", "hub_token"}


class Step(NamedTuple):
    """A step of a recipe: its name, the script that runs it, and the flags it runs with."""

    name: str
    script: str
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.settings["output_dir"])

    def __str__(self) -> str:
        """What it does, and how long, in a line."""
        settings = self.settings
        data = [settings.get(name) for name in ("train_file", "dataset_name", "dataset_config_name", "task_name")]
        steps = int(settings.get("max_steps", 0))
        length = f"{steps:,} steps" if steps > 0 else f"{settings.get('num_train_epochs', 3)} epochs"
        where = " ".join(str(each) for each in data if each)
        return f"{self.name}: {self.script}, {length} on {where}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Convert without training, or run a recipe; returns the rows of all evaluations, each with its `step`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & {*given}:
        make_parser().parse_args(["--help"])
    if untrained.is_meant(given):
        return untrained.main(given)
    if "RANK" in os.environ:
        raise ValueError(
            "`fas convert` must be started once for a recipe, got a launcher around it: its steps start processes of "
            'their own where the recipe says `launcher: [torchrun, --standalone, --nproc_per_node, "2", -m]`.'
        )
    recipe, flags = read_recipe(given)
    output_dir = Path(flags.pop("output_dir", recipe.get("output_dir", "")))
    steps = plan(recipe, flags, output_dir)
    for step in steps:
        check_step(step, recipe.get("launcher"))
    check_writable(str(output_dir))
    logger.info("Steps:\n%s", "\n".join(f"  {step}" for step in steps))
    rows, ran = [], False
    with only_run(output_dir):
        for step in steps:
            try:
                ran |= run_step(step, recipe.get("launcher"), start_changed=ran)
            except ValueError as error:
                kept = recipe.get("default_steps", [])
                if kept and step.name not in kept:
                    way_out = f"--steps {' '.join(kept)} leaves step {step.name!r} out."
                    raise ValueError(f"{error} {way_out}") from error
                raise
            found = read_results(step.folder / RESULTS_FILE)["metrics"]["rows"]
            rows += [{"step": step.name, **row} for row in found]
        configuration = {step.name: {"script": step.script, **step.settings} for step in steps}
        command = ["python", "-m", "training.convert", *given]
        write_results(output_dir / SUMMARY_FILE, metrics={"rows": rows}, configuration=configuration, command=command)
    logger.info("%s\n\nThe model is in %s", markdown_table([flat(row) for row in rows]), steps[-1].folder)
    return rows


def read_recipe(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe and the flags beside it; without a name, the short form of that for the kind of model."""
    first = argv[0] if argv and not argv[0].startswith("--") else None
    flags = read_flags(argv if first is None else argv[1:])
    named = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if first in named or Path(first or "").suffix in (".yaml", ".yml"):
        recipe = read_yaml(named.get(str(first), Path(str(first))))
    else:
        if first and flags.setdefault("model_name_or_path", first) != first:
            raise UsageError(f"`MODEL` and `--model_name_or_path` exclude each other, got {first!r} and the flag.")
        model = flags.get("model_name_or_path")
        recipe = read_yaml(RECIPES / f"{_recipe_for(model, flags)}.yaml")
        wanted = {flag.partition(".")[0] for flag in flags if "." in flag} | {*recipe["default_steps"]}
        flags.setdefault("steps", [name for name in recipe["steps"] if name in wanted])
    unknown = recipe.keys() - RECIPE_KEYS
    if unknown or not isinstance(recipe.get("steps"), dict):
        raise ValueError(
            f"A recipe must have `steps` and may have {', '.join(sorted(RECIPE_KEYS))}, got {list(recipe)}."
        )
    return recipe, flags


def _recipe_for(model: Any, flags: dict[str, Any]) -> str:
    """The name of the recipe for a model, on data that the flags name."""
    if model is None:
        raise UsageError("`MODEL` or `--model_name_or_path` is required where no recipe is given. --help says more.")
    try:
        require_model_type(FASConfig.get_config_dict(model)[0])
        name = "decoder" if FASConfig.from_pretrained(model).table.causal else "encoder"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--model_name_or_path` must be a checkpoint that can spike, got {model!r}: {error} (The recipes are "
            f"{', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}.)"
        ) from error
    if not (DATA_SOURCES | {"task_name"}) & {flag.rpartition(".")[2] for flag in flags}:
        raise UsageError(
            "`--train_file` and --validation_file, --dataset_name or --task_name is required: what the model learns "
            f"to spike on. Without training: --sites and --calibration_file. `fas convert {name}` takes the data of "
            "the published method, and its many steps on a large corpus."
        )
    return name


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Read `--flag value …` into a mapping; one without a value is true, one with several a list."""
    flags: dict[str, Any] = {}
    name = ""
    for token in argv:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
            step, dot, flag = name.rpartition(".")
            name = step + dot + flag.replace("-", "_")  # argparse takes both
            flags[name] = [value] if value else []
        elif not name:
            raise ValueError(f"Flags must start with `--`, got {token!r}.")
        else:
            flags[name].append(token)
    return {name: values[0] if len(values) == 1 else values or True for name, values in flags.items()}


def plan(recipe: dict[str, Any], flags: dict[str, Any], output_dir: Path) -> list[Step]:
    """Return the steps, each with its settings: the shared ones, its own, then the flags.

    Each step starts from what the one before it made, unless the recipe names its model. Data that flags name takes
    the place of the recipe's as a whole.
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
        given = without_other_data(general, special) | special
        settings = {"do_train": True, "do_eval": True, **without_other_data({**shared, **own}, given), **given}
        if model is not None and "model_name_or_path" not in {**own, **special}:
            settings["model_name_or_path"] = model
        if settings.get("stage") == "baseline" or str(settings["do_eval"]).lower() == "false":
            settings.pop("T", None)
        settings["output_dir"] = str(output_dir / name)
        model = settings["output_dir"]
        steps.append(Step(name, script, settings))
    return steps


def check_step(step: Step, launcher: list[str] | None) -> None:
    """Raise for flags that its script would refuse, so that no step before it has trained in vain.

    Raises:
        UsageError: for a flag that does not exist, or a value of another kind.
        ValueError: for settings that contradict each other, or files that are not there.
    """
    try:
        flags = parse_flags(to_flags(step.settings))
        model, data = read_fields(ModelArguments, flags), read_fields(DataArguments, flags)
        if launcher:  # whose processes are not here: what they share can't be made in this one
            model.check(step.script.removeprefix("run_"), flags.do_eval)
            data.check(step.script.removeprefix("run_"), flags.do_train, flags.do_eval)
        else:
            check_arguments(step.script.removeprefix("run_"), model, data, read_fields(FASTrainingArguments, flags))
    except ValueError as error:
        kind = UsageError if isinstance(error, UsageError) else ValueError
        raise kind(f"Step {step.name!r}: {error}") from error


def run_step(step: Step, launcher: list[str] | None, *, start_changed: bool = False) -> bool:
    """Run a step unless it is finished; returns whether it trained.

    A finished step is evaluated anew where only flags that evaluate differ.

    Raises:
        ValueError: if its folder holds a finished step with other settings, or one from a model that was made anew
            since. (What an interrupted one may change, its checkpoints know.)
    """
    name, script, settings = step
    folder = step.folder
    mark = folder / STEP_FILE
    found: dict[str, Any] = read_results(mark) if mark.is_file() else {"settings": settings, "finished": False}
    changed = {
        key
        for key in (found["settings"].keys() | settings.keys()) - SHOWS
        if str(plain(found["settings"]).get(key)) != str(plain(settings).get(key))  # of secrets neither has the value
    }
    trains = sorted(changed - evaluation_flags(step))
    if trains and found["finished"]:
        raise ValueError(
            f"`--output_dir` must not hold step {name!r} with other settings, got {str(folder)!r}, where "
            f"{', '.join(trains)} differ. Remove that folder, or choose another --output_dir."
        )
    if start_changed and (found["finished"] or checkpoints(folder)):
        raise ValueError(
            f"`--output_dir` must not hold step {name!r} from an earlier model, got {str(folder)!r}, while the step "
            "before it was run anew. Remove that folder."
        )
    if found["finished"] and not changed:
        logger.info("Step %s is finished: skipped.", name)
        return False
    if found["finished"]:
        logger.info("Step %s is trained: evaluated anew, since %s changed.", name, ", ".join(sorted(changed)))
        evaluate_anew(step, launcher)
    else:
        logger.info("Step %s: %s", name, script)
        write_json(mark, {"settings": settings, "finished": False})
        run_script(script, {**settings, "resume_from_checkpoint": True}, launcher)
    write_json(mark, {"settings": settings, "finished": True})
    remove_checkpoints(folder)
    return not found["finished"]


def evaluation_flags(step: Step) -> set[str]:
    """Flags of a step that its weights do not depend on, because what it is evaluated on was never trained on.

    A corpus without a validation file is evaluated on a part of its training data, which these flags choose.
    """
    held_out = step.script == "run_glue" or step.settings.get("validation_file")
    streaming = str(step.settings.get("streaming", False)).lower() == "true"
    flags = EVALUATES | (CHOOSES_EVALUATION if held_out else set())
    return flags if held_out or not streaming else flags - {"max_eval_samples"}


def evaluate_anew(step: Step, launcher: list[str] | None) -> None:
    """Evaluate the model of a finished step as its settings say now; the record of its training stays."""
    path = step.folder / RESULTS_FILE
    before = read_results(path)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=step.folder) as scratch:
        settings = {**step.settings, "do_train": False, "push_to_hub": False}
        run_script(step.script, {**settings, "model_name_or_path": str(step.folder), "output_dir": scratch}, launcher)
        now = read_results(Path(scratch) / RESULTS_FILE)
    configuration = before["configuration"]
    for group in ("model", "data", "training"):
        names = (EVALUATES | CHOOSES_EVALUATION) & configuration[group].keys()
        configuration[group] |= {name: now["configuration"][group][name] for name in names}
    command = ["python", "-m", f"training.{step.script}", *to_flags(step.settings)]
    training = before.get("training", {})
    write_results(path, metrics=now["metrics"], configuration=configuration, command=command, training=training)


def run_script(script: str, settings: dict[str, Any], launcher: list[str] | None) -> None:
    """Run a script of this package with settings as flags: in this process, or as its launcher does."""
    flags = to_flags(settings)
    if not launcher:
        importlib.import_module(f"training.{script}").main(flags)
        return
    root, others = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, *([others] if others else [])])
    # A folder `training` where the command is given is not this package (Python 3.10 has no such switch).
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    subprocess.run([*launcher, f"training.{script}", *flags], check=True, env=environment)


def make_parser() -> Any:
    """The flags of the command, those of a conversion without training, and help on both kinds."""
    return untrained.make_parser(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def command(argv: Sequence[str]) -> int:
    """As [`main`], with messages for errors; returns the exit status."""
    memory = "Fewer --tokens, a lower --limit, a smaller batch or a smaller model need less."
    return run_command(main, "Not converted", argv, memory=memory)


if __name__ == "__main__":
    show_messages()
    sys.exit(command(sys.argv[1:]))
