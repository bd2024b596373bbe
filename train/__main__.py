"""`python -m train`: train, resume, prepare data, list recipes, run the demo."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import tn
import zoo
from tn.errors import unknown
from train import cli, data, launch, recipes
from train.errors import ConfigError, TrainError
from zoo.pipes import quiet_pipe

_USAGE = """\
usage: python -m train COMMAND …

train
{recipes}
  (every setting is a flag: python -m train {first} --help)

other commands
  resume RUN              continue a run that was stopped, bit-exactly
  prepare DATA            make the token cache of a corpus ahead of a run
  recipes                 list the recipes
  demo                    train a BTT GPT and its dense twin, and compare them

examples
  python -m train gpt --steps 200 --model.structure btt --model.rank 2 --out runs/btt
  python -m train gpt --config runs/btt/config.yaml --lr 1e-3
  python -m train resume runs/btt
"""
_COMMANDS = ("resume", "prepare", "recipes", "demo")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the process's exit status: 0, 2 after a wrong command line, 1 after any other refusal."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return quiet_pipe(lambda: _command(words))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainError, tn.TnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _command(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if command in recipes.names():
        launch.run(cli.parse(command, rest))
    elif command == "resume":
        parser = _Parser(prog="python -m train resume", description="Continue a run from its newest complete checkpoint.")
        parser.add_argument("run", type=Path, help="the run's folder")
        parser.add_argument("--threads", type=int, help="another number of CPU threads than the run's own (then not bit-equal)")
        options = parser.parse_args(rest)
        launch.resume(options.run, threads=options.threads)
    elif command == "prepare":
        _prepare(rest)
    elif command == "recipes":
        print(_recipe_lines())
    elif command == "demo":
        from train import demo  # it is a program of its own, not a part of training

        return demo.main(rest) or 0
    else:
        raise ConfigError(unknown("recipe or command", command, (*recipes.names(), *_COMMANDS)))
    return 0


def _prepare(words: list[str]) -> None:
    default = recipes.gpt()
    parser = _Parser(prog="python -m train prepare", description="Make the token cache of a corpus ahead of a run.")
    names = ", ".join(zoo.tokenizer_names())
    parser.add_argument("data", help="stdlib, text:PATH, hf:NAME_OR_PATH or bin:DIR")
    parser.add_argument("--tokenizer", default=default.tokenizer, help=f"{names} (default {default.tokenizer})")
    parser.add_argument("--cache_dir", "--cache-dir", help="where prepared tokens are kept")
    options = parser.parse_args(words)
    data.prepare_main(options.data, options.tokenizer, cache_dir=options.cache_dir)


def _usage() -> str:
    return _USAGE.format(recipes=_recipe_lines(), first=recipes.names()[0])


def _recipe_lines() -> str:
    return "\n".join(f"  {name:<22}  {(recipes.RECIPES[name].__doc__ or '').splitlines()[0]}" for name in recipes.names())


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in message.removeprefix("unrecognized arguments: ").split()[:1]:
            if word.startswith("--"):
                raise ConfigError(unknown("flag", word.partition("=")[0], flags))
        raise ConfigError(f"{self.prog}: {message}")


if __name__ == "__main__":
    sys.exit(main())
