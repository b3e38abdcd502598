"""The command line: which command, which exit code, and all printing.

Results go to standard output, everything else to standard error. Exit code 0: done; 1: the command ran and found
problems; 2: the call or the input was wrong (one line says what); 75: another process of the run was lost; 130 and 143:
interrupted by SIGINT and SIGTERM. Of several processes only the first prints results, and each its own errors. A
command's module is imported when it is called, so that ``gesso --help`` needs no torch.
"""

import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

import gesso
from gesso import launch, log
from gesso.commands.interruption import again
from gesso.commands.parsing import Result
from gesso.errors import ConfigError, GessoError, nearest

HELP = """usage: gesso COMMAND ... [--help]

Pre-trains object detectors, transfers them to your task, and shows why that helped.

  demo                            the main job on embedded data; writes runs/demo/report.html
  data import SOURCE --out INDEX  reads boxes, classes or maps in any of 8 formats into an index
  data check SOURCE               finds what is wrong with a data set; exit code 1 if anything is
  data stats INDEX                counts images, boxes and classes
  data split INDEX --out DIR      divides an index into train, val and test
  data select INDEX --out NEW     takes some classes or some images
  data export INDEX --out DIR     writes COCO, VOC or YOLO back
  train RECIPE --out RUN          trains; --resume goes on, --gpus N starts N processes
  transfer RUN --data INDEX ...   fine-tunes a run's weights for other data
  transfer matrix ...             pre-trainings x targets x parts x seeds: did it pay?
  transfer probe RUN --data INDEX ...  linear classifiers on the frozen features of a run
  evaluate RUN --data INDEX       scores of a run on an index
  predict RUN PICTURE... --out D  detections, maps or classes, and drawn pictures
  score coco --gt FILE --dt FILE  COCO metrics of any pair of files
  score voc --gt FILE --dt FILE   PASCAL VOC's AP, over all points or 11
  score miss-rate --gt F --dt F   log-average miss rate of pedestrians
  score miou --gt DIR --dt DIR    mean IoU of label maps
  score top1 --gt CSV --dt CSV    accuracy of the first guess, and of the first five
  plan memory RECIPE --memory M   which resolutions and batches fit a card, and what they cost
  plan scaling RECIPE --run RUN   predicts hours and efficiency on 1 to 1,024 GPUs
  plan bench [RECIPE]             measures efficiency over the processes at hand
  debug replay FILE               repeats a step that was not finite, and names the module
  recipes [--check]               lists the recipes
  config RECIPE                   prints every setting of a recipe

Every command has --help, and --json where it has results."""

COMMANDS = {
    "demo": "demo:demo",
    "data import": "data:import_",
    "data check": "data:check_",
    "data stats": "data:stats",
    "data split": "data:split_",
    "data select": "data:select_",
    "data export": "data:export_",
    "train": "runs:train_",
    "transfer": "transfer:transfer",
    "transfer matrix": "transfer:matrix",
    "transfer probe": "transfer:probe_",
    "evaluate": "runs:evaluate",
    "predict": "predict:predict",
    "score coco": "score:coco",
    "score voc": "score:voc",
    "score miss-rate": "score:miss_rate",
    "score miou": "score:miou",
    "score top1": "score:top1",
    "plan memory": "plan_memory:memory",
    "plan scaling": "plan:scaling",
    "plan bench": "plan:bench_",
    "debug replay": "debug:replay_",
    "recipes": "recipes:recipes",
    "config": "recipes:config",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. ``argv`` is ``sys.argv[1:]`` by default."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        log.to_stderr()
        return _show(words)
    except GessoError as error:
        return error.exit_code if error.told else _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return 130 if launch.rank() else _say(f"interrupted. {again(words)}", 130)
    except MemoryError:
        return _say("the memory does not suffice. Choose smaller numbers, fewer workers, or smaller batches.", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return 0
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _say(f"{where}{error.strerror}. Check the path, its rights, and the space on the disk.", 2)


def _show(words: list[str]) -> int:
    exit_code = 0
    try:
        result = _run(words)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
        said = result.text if result.data is None else json.dumps(result.data)
        if said and not launch.rank():
            print(said)
        exit_code = result.exit_code
    except SystemExit:  # the parser has printed its help
        pass
    sys.stdout.flush()  # a closed pipe is noticed here, not when the interpreter ends
    return exit_code


def _say(line: str, exit_code: int) -> int:
    print(f"gesso: {log.prefix()}{line}", file=sys.stderr)
    return exit_code


def _run(words: list[str]) -> Result:
    if not words or words[0] in ("-h", "--help", "help"):
        return Result(HELP)
    if words[0] == "--version":
        return Result(f"gesso {gesso.__version__}")
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            module, function = COMMANDS[name].split(":")
            command = getattr(importlib.import_module(f"gesso.commands.{module}"), function)
            result: Result = command(words[length:])
            return result
    return _unknown(words)


def _unknown(words: list[str]) -> Result:
    group = [name.split()[1] for name in COMMANDS if name.startswith(f"{words[0]} ")]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        return Result(f"usage: gesso {words[0]} {'|'.join(group)} ... [--help]")
    known = group or sorted({name.split()[0] for name in COMMANDS})
    what = " ".join(words[: 2 if group else 1])
    raise ConfigError(f"unknown command 'gesso {what}'", remedy=nearest(words[1] if group else words[0], known))
