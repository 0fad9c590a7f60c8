"""The command line: parse, print, exit code. The only place with handlers, progress bars and exits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Make LLaMA-family models small enough for the computer you have.")

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'embedded' for the model that comes along.")]
RecipeText = Annotated[str, typer.Argument(help="YAML file, packaged name, inline YAML, or one line such as "
                                                "'depth:2, wanda:2:4, gptq:4'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens of a calibration window (at most what the model knows).")]
Workers = Annotated[str | None, typer.Option(help="Scheduler of a Dask cluster, such as tcp://192.168.1.5:8786.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca", help="Certificate of the authority, for tls:// addresses.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="This computer's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="Its key.")]
Scratch = Annotated[Path | None, typer.Option(help="Directory for hidden states (default: beside the result).")]


@contextmanager
def _answers(as_json: bool = False) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code: 1 for a user's error, 130 for Ctrl-C."""
    from tsotsallm.errors import TsotsallmError

    _quiet_libraries()
    try:
        yield
    except TsotsallmError as error:
        _fail(str(error), type(error).__name__, as_json)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the free "
              "space", type(error).__name__, as_json)


def _fail(message: str, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    else:
        print(f"tsotsallm: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _quiet_libraries() -> None:
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _computers(workers: str | None, ca: str | None, cert: str | None, key: str | None) -> Any:
    """The cluster that options name; None without one."""
    from tsotsallm.api import Computers
    from tsotsallm.errors import ClusterError

    if workers is None and (ca or cert or key):
        raise ClusterError("--tls-ca, --tls-cert and --tls-key belong to --workers, which is not given")
    return None if workers is None else Computers(workers, ca, cert, key)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))


@app.command()
def compress(model: Model, recipe: RecipeText,
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
             calibration: Annotated[str | None, typer.Option(help="Text file, directory of texts, or hub data set.")] = None,
             windows: Windows = 32, window: Window = 1024,
             seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
             device: Device = "cpu", scratch: Scratch = None,
             keep_stages: Annotated[bool, typer.Option(help="Keep the model after every stage, in OUT-stages.")] = False,
             force: Annotated[bool, typer.Option(help="Start although memory or disk seem too small.")] = False,
             task: Annotated[str | None, typer.Option(help="Tasks to ask the original and every stage's model, with commas "
                                                           "between.")] = None,
             data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
             limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
             as_json: AsJson = False) -> None:
    """Apply a recipe to a checkpoint, one layer at a time, and write a smaller one."""
    with _answers(as_json):
        from tsotsallm import api, console
        from tsotsallm.errors import TsotsallmError

        tasks = task.split(",") if task else []
        if tasks:
            api.check_tasks(tasks, data=data, limit=limit)
        elif data is not None or limit is not None:
            raise TsotsallmError("--data and --limit belong to --task, which is not given")
        bar, show = console.progress_bar(as_json)
        with bar:
            result = api.compress(model, recipe, out, calibration=calibration, windows=windows, window=window, seed=seed,
                                  device=device, scratch=scratch, keep_stages=keep_stages or bool(tasks), force=force,
                                  progress=show)
        if not as_json:
            console.print_result(result)
        found = None
        if tasks:
            asking, tick = console.step_bar(as_json)
            with asking:
                found = api.examine_stages(model, result, tasks, data=data, limit=limit, device=device, tick=tick)
            if not as_json:
                console.print_stages(found)
        if as_json:
            _print_json(result.plain() | ({"examination": found.plain()} if found is not None else {}))


@app.command()
def plan(model: Model, recipe: RecipeText,
         out: Annotated[Path, typer.Option("-o", "--out", help="Where the result would go.")] = Path("result"),
         windows: Windows = 32, window: Window = 1024, device: Device = "cpu",
         keep_stages: Annotated[bool, typer.Option(help="Forecast a run that keeps every stage.")] = False,
         as_json: AsJson = False) -> None:
    """Forecast memory, disk, time and resulting bytes without reading a tensor."""
    with _answers(as_json):
        from tsotsallm import api, console

        forecast = api.plan(model, recipe, out, windows=windows, window=window, device=device, keep_stages=keep_stages)
        _print_json(forecast.plain()) if as_json else console.print_plan(forecast)


@app.command()
def evaluate(models: Annotated[list[str], typer.Argument(help="Checkpoints; differences are to the first.")],
             text: Annotated[Path | None, typer.Option(help="UTF-8 text to take the perplexity of.")] = None,
             task: Annotated[str | None, typer.Option(help="Tasks by name, YAML or BIG-bench JSON file, with commas "
                                                           "between; `tsotsallm tasks` lists them.")] = None,
             harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness.")] = None,
             data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
             limit: Annotated[int | None, typer.Option(help="So many items, drawn by the seed; the first windows.")] = None,
             seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
             context: Annotated[int, typer.Option(help="Tokens of a window of --text, BOS included.")] = 512,
             protocol: Annotated[str, typer.Option(help="Of --text: windows, or rows (each line by itself).")] = "windows",
             reference: Annotated[str | None, typer.Option(help="The original, for KL divergence.")] = None,
             kv: Annotated[str, typer.Option(help="Of a GGUF file: types of its key-value cache to compare.")] = "f16",
             speed: Annotated[bool, typer.Option(help="Measure speed and memory as well.")] = False,
             country: Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy and CO₂ as well.")] = None,
             by_sweeps: Annotated[bool, typer.Option(help="Generate by sweeps although the model fits memory.")] = False,
             plan_only: Annotated[bool, typer.Option("--plan", help="Only tell how tasks would run, and how long.")] = False,
             groups: Annotated[bool, typer.Option(help="Show every group of items (subjects, languages).")] = False,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", scratch: Scratch = None, as_json: AsJson = False) -> None:
    """Score models on a text or on tasks, with errors, paired differences and cost; one layer in memory."""
    with _answers(as_json):
        from tsotsallm import api, console
        from tsotsallm.errors import TsotsallmError, nearest

        _refuse_what_would_be_ignored(text=text, task=task, harness=harness, data=data, plan_only=plan_only,
                                      context=context, protocol=protocol, reference=reference)
        if protocol not in ("windows", "rows"):
            raise TsotsallmError(f"there is no protocol {protocol!r}{nearest(protocol, ('windows', 'rows'))}")
        if harness is not None:
            scored = {model: api.harness(model, harness.split(","), limit=limit, include=data, device=device,
                                         scratch=scratch) for model in models}
            _print_json(scored) if as_json else console.print_harness(scored)
            return
        computers = _computers(workers, tls_ca, tls_cert, tls_key)
        if computers is not None:
            if task is None or speed or country or plan_only or by_sweeps or device != "cpu":
                raise TsotsallmError("--workers asks tasks on a cluster; give --task, and leave --speed, --country, --plan, "
                                     "--by-sweeps and --device out")
            answers = api.examine_on_cluster(models, task.split(","), computers, data=data, limit=limit, seed=seed,
                                             reference=reference, say=_to_stderr)
            _print_json(answers.plain()) if as_json else console.print_examination(answers, groups=groups)
            return
        bar, show = console.step_bar(as_json)
        if any(model.endswith(".gguf") for model in models) or kv != "f16":
            if country or plan_only or by_sweeps or protocol != "windows":
                raise TsotsallmError("--country, --plan, --by-sweeps and --protocol do not reach GGUF files, which are "
                                     "scored in windows; leave them out, or give the checkpoint")
            if speed:
                speeds = api.gguf_speeds(models, text=text, task=task, kv=kv, reference=reference)
                _print_json({model: asdict(one) for model, one in speeds.items()}) if as_json else (
                    console.print_speeds(speeds))
                return
            with bar:
                caches = api.evaluate_gguf(models, text, kv=kv.split(","), context=context, reference=reference, limit=limit,
                                           task=task, tick=show)
            _print_json([one.plain() for one in caches]) if as_json else console.print_caches(caches)
            return
        if task is None and len(models) == 1 and not (speed or country or plan_only):
            with bar:
                one = api.evaluate(models[0], text, context=context, protocol=protocol,  # type: ignore[arg-type]
                                   reference=reference, device=device, scratch=scratch, limit=limit, tick=show)
            _print_json(one.plain()) if as_json else console.print_perplexity(one)
            return
        if task is None and text is None and "embedded" not in (*models, reference):
            raise TsotsallmError("give the text to evaluate on with --text FILE, or a task with --task; only the embedded "
                                 "model brings its own text")
        asked: list[Any] = task.split(",") if task is not None else [
            api.text_task(context, protocol, world=text is None)]   # type: ignore[arg-type]
        data = data if task is not None else text
        if plan_only:
            forecasts = api.plan_examination(models, asked, data=data, limit=limit, seed=seed, device=device,
                                             by_sweeps=by_sweeps or None)
            _print_json([one.plain() for one in forecasts]) if as_json else console.print_forecasts(forecasts)
            return
        with bar:
            found = api.examine(models, asked, data=data, limit=limit, seed=seed, reference=reference, device=device,
                                speed=speed, country=country, by_sweeps=by_sweeps or None, scratch=scratch, tick=show)
        _print_json(found.plain()) if as_json else console.print_examination(found, groups=groups)


def _refuse_what_would_be_ignored(*, text: Path | None, task: str | None, harness: str | None, data: Path | None,
                                  plan_only: bool, context: int, protocol: str, reference: str | None) -> None:
    """Raise where options do not belong together."""
    from tsotsallm.errors import TsotsallmError

    if sum(one is not None for one in (text, task, harness)) > 1:
        raise TsotsallmError("--text, --task and --harness are three kinds of evaluation; choose one at a time")
    if data is not None and task is None and harness is None:
        raise TsotsallmError("--data belongs to --task or --harness; a text to score is given with --text")
    if (task or harness) and (context != 512 or protocol != "windows"):
        raise TsotsallmError("--context and --protocol are of --text; a task's own file says its context and protocol")
    if harness and (plan_only or reference):
        raise TsotsallmError("--plan and --reference do not reach tasks of lm-evaluation-harness; leave them out")


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show what a checkpoint is made of: widths, parameters, bytes by part, cache and work per token."""
    with _answers(as_json):
        from tsotsallm import api, console

        found = api.inspect(model)
        _print_json(found.plain()) if as_json else console.print_anatomy(str(model), found)


@app.command()
def export(model: Model,
           gguf: Annotated[Path | None, typer.Option(help="Write this GGUF file, for llama.cpp and Ollama.")] = None,
           hf: Annotated[Path | None, typer.Option(help="Write this plain Hugging Face checkpoint, all dense.")] = None,
           dense: Annotated[str | None, typer.Option(help="f16, bf16 or f32: for weights on no grid of GGUF.")] = None,
           ollama: Annotated[bool, typer.Option(help="Add a Modelfile for Ollama.")] = False,
           verify: Annotated[bool, typer.Option(help="Compare with llama.cpp, where it is installed.")] = True,
           as_json: AsJson = False) -> None:
    """Write a checkpoint in a form that other engines run; one layer at a time is in memory."""
    with _answers(as_json):
        from tsotsallm import api, console
        from tsotsallm.errors import ExportError

        if (gguf is None) == (hf is None):
            raise ExportError("say what to write: --gguf OUT.gguf or --hf DIRECTORY, one of them")
        if hf is not None and (dense or ollama):
            raise ExportError("--dense and --ollama belong to --gguf")
        bar, show = console.step_bar(as_json)
        with bar:
            found = api.to_huggingface(model, hf, tick=show) if gguf is None and hf is not None else api.to_gguf(
                model, str(gguf), dense=dense, ollama=ollama, verify=verify, tick=show)
        _print_json(found) if as_json else console.print_export(found)


Tokens = Annotated[int, typer.Option(help="New tokens at most.")]
Kv = Annotated[str, typer.Option(help="Key-value cache of a GGUF file: f32, f16, q8_0 or q4_0.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this share together.")]
TopK = Annotated[int, typer.Option(help="Sample among so many likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
ApiKey = Annotated[str | None, typer.Option(help="Key that requests must bring.", envvar="TSOTSALLM_API_KEY")]
Slots = Annotated[int, typer.Option(help="Answers at a time of a GGUF file.", min=1, max=64)]
Queue = Annotated[int, typer.Option(help="Questions that may wait; more are turned away (429).", min=0)]
MaxTokens = Annotated[int, typer.Option(help="New tokens of an answer at most.", min=1)]
Timeout = Annotated[float, typer.Option(help="Seconds that a request may take.", min=1)]
MaxBody = Annotated[str, typer.Option(help="Bytes of a request at most.")]
PromptCache = Annotated[bool, typer.Option(help="Whether what was read serves the next question that begins alike; off, the "
                                                "same seed gives the same text in one slot.")]
Country = Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy of every answer as well.")]
GgufOrCheckpoint = Annotated[str, typer.Argument(help="GGUF file, checkpoint directory, hub id, or 'embedded'.")]
Adapter = Annotated[Path | None, typer.Option(help="GGUF adapter beside a GGUF file.")]


@app.command()
def generate(model: GgufOrCheckpoint,
             prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
             prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt in every line, instead.")] = None,
             out: Annotated[Path | None, typer.Option("-o", "--out", help="Of --prompts: JSON lines to write.")] = None,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             tokens: Tokens = 64, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0, seed: Seed = 0,
             kv: Kv = "f16", adapter: Adapter = None) -> None:
    """Continue a text, or many: GGUF files in llama.cpp, checkpoints in transformers."""
    with _answers():
        from tsotsallm import api
        from tsotsallm.errors import TsotsallmError

        computers = _computers(workers, tls_ca, tls_cert, tls_key)
        if prompts is not None:
            if prompt is not None or out is None or kv != "f16" or adapter is not None:
                raise TsotsallmError("--prompts FILE goes with -o OUT, and without a prompt, --kv or --adapter")
            count = api.generate_many(model, prompts, out, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                                      seed=seed, workers=computers, say=_to_stderr)
            print(f"{count} answers in {out}")
            return
        if prompt is None or out is not None or computers is not None:
            raise TsotsallmError("give a text to continue; -o and --workers are for many, given by --prompts FILE")
        answer = api.generate(model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                              kv=kv, adapter=adapter)
        print(prompt, end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print()


@app.command()
def chat(model: GgufOrCheckpoint, tokens: Tokens = 256, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
         seed: Seed = 0, kv: Kv = "f16", adapter: Adapter = None) -> None:
    """Converse: one line, one answer; an empty line or Ctrl-D ends it."""
    with _answers():
        from tsotsallm import api

        conversation = api.Conversation(model, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                                        kv=kv, adapter=adapter)
        interactive = sys.stdin.isatty()
        while True:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                break
            for piece in conversation.answer(line):
                print(piece, end="", flush=True)
            print()


@app.command()
def push(result: Annotated[Path, typer.Argument(help="A result's directory, or a GGUF file.")],
         repository: Annotated[str, typer.Argument(help="NAME/MODEL on the hub.")],
         upload: Annotated[bool, typer.Option("--upload", help="Really upload; else only say what would be.")] = False,
         public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
         as_json: AsJson = False) -> None:
    """Upload a result with its model card to the hub; without --upload nothing is sent."""
    with _answers(as_json):
        from tsotsallm import api, console

        found = api.push(result, repository, upload=upload, public=public)
        _print_json(found) if as_json else console.print_push(found)


@app.command()
def fit(model: Model,
        out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the model, its GGUF file and what was found.")],
        device: Annotated[str | None, typer.Option(help="A device by name; `tsotsallm devices` lists them.")] = None,
        size: Annotated[str | None, typer.Option("--bytes", help="Bytes of the GGUF file, such as 700MB.")] = None,
        faster_than: Annotated[float | None, typer.Option(help="Tokens a second, measured on this machine.")] = None,
        keep_text: Annotated[list[Path] | None, typer.Option(help="Texts in the languages to keep.")] = None,
        calibration: Annotated[str | None, typer.Option(help="Text file, directory of texts, or hub data set.")] = None,
        windows: Windows = 32, window: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
        minutes: Annotated[float, typer.Option(help="No candidate is begun later.")] = 60.0,
        recover: Annotated[bool, typer.Option(help="Let layers learn from the original's after a cut.")] = False,
        quick: Annotated[bool, typer.Option(help="Round candidates in a third of the time, at some loss.")] = False,
        task: Annotated[str | None, typer.Option(help="Tasks to ask the original and the result.")] = None,
        data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
        limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
        seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0, as_json: AsJson = False) -> None:
    """Find the best model for a device or a size, and write it with its GGUF file."""
    with _answers(as_json):
        from tsotsallm import api, console

        bar, show = console.progress_bar(as_json)
        with bar:
            found = api.fit(model, out, device=device, size=size, faster_than=faster_than, keep_text=keep_text or (),
                            calibration=calibration, windows=windows, window=window, minutes=minutes, recover=recover,
                            quick=quick, tasks=task.split(",") if task else (), data=data, limit=limit, seed=seed,
                            say=_to_stderr if as_json else print, progress=show)
        _print_json(found[0].plain() | ({"examination": found[1].plain()} if found[1] else {})) if as_json else (
            console.print_fit(*found))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class _Studies(TyperGroup):
    """`tsotsallm study SPEC` runs a study; show, compare and export look at one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


studies = typer.Typer(cls=_Studies, no_args_is_help=True, rich_markup_mode=None,
                      help="Try many recipes: `tsotsallm study SPEC -o FOLDER`; show, compare and export look at it.")
app.add_typer(studies, name="study")
Folder = Annotated[Path, typer.Argument(help="The folder of a study.")]


@studies.command("run")
def study_run(spec: Annotated[str, typer.Argument(help="YAML file or packaged name: reference-pruning, reference-pipeline, "
                                                       "reference-order, franken, quick.")],
              out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the study; an unfinished one goes on.")],
              model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'embedded'.")] = "embedded",
              values: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE that the study needs.")] = None,
              text: Annotated[Path | None, typer.Option(help="Text to evaluate on.")] = None,
              calibration: Annotated[str | None, typer.Option(help="Text to calibrate on.")] = None,
              trials: Annotated[int | None, typer.Option(help="At most so many trials.")] = None,
              hours: Annotated[float | None, typer.Option(help="No trial begins later.")] = None,
              workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
              as_json: AsJson = False) -> None:
    """Run a study, or go on with it."""
    with _answers(as_json):
        from tsotsallm import api, console

        found = api.run_study(spec, out, model=model, given=_pairs(values or []), text=text, calibration=calibration,
                              trials=trials, hours=hours, workers=_computers(workers, tls_ca, tls_cert, tls_key),
                              say=_to_stderr if as_json else print)
        _print_json(found.plain()) if as_json else console.print_study(found)


@studies.command("show")
def study_show(folder: Folder,
               notebook: Annotated[bool, typer.Option(help="Show the lab notebook: plan, implement, revise.")] = False,
               as_json: AsJson = False) -> None:
    """Show the trials of a study, the front, and the verdict."""
    with _answers(as_json):
        from tsotsallm import api, console

        if notebook:
            notes = api.notebook(folder)
            _print_json(notes) if as_json else console.print_notebook(notes)
            return
        found = api.open_study(folder)
        _print_json(found.plain()) if as_json else console.print_study(found)


@studies.command("compare")
def study_compare(folder: Folder, trials: Annotated[list[int], typer.Argument(help="Numbers of trials.")],
                  as_json: AsJson = False) -> None:
    """Put trials side by side: recipes, measures, what they took."""
    with _answers(as_json):
        from tsotsallm import api, console

        found = api.trials_of(folder, trials)
        _print_json([one.plain() for one in found]) if as_json else console.print_trials(found)


@studies.command("export")
def study_export(folder: Folder, csv: Annotated[Path, typer.Option(help="File to write, a line for every trial.")]) -> None:
    """Write the ledger as a table."""
    with _answers():
        from tsotsallm import api

        print(f"{api.export_study(folder, csv)} trials in {csv}")


def _pairs(values: list[str]) -> dict[str, str]:
    from tsotsallm.errors import StudyError

    for value in values:
        if "=" not in value:
            raise StudyError(f"--set takes NAME=VALUE, but here is {value!r}")
    return {name: value for name, _, value in (one.partition("=") for one in values)}


@app.command()
def report(paths: Annotated[list[str], typer.Argument(help="A result, several results, a fit's folder, or a study's.")],
           out: Annotated[Path, typer.Option("-o", "--out", help="The page to write, such as report.html.")],
           reference: Annotated[str | None, typer.Option(help="The original, to compare results with.")] = None,
           text: Annotated[Path | None, typer.Option(help="UTF-8 text to evaluate on.")] = None,
           task: Annotated[str | None, typer.Option(help="Tasks to ask, with commas between.")] = None,
           data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
           limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
           seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
           prompts: Annotated[Path | None, typer.Option(help="Prompts to continue, one a line.")] = None,
           tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 40,
           speed: Annotated[bool, typer.Option(help="Measure speed and memory as well.")] = False,
           country: Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy and CO₂ as well.")] = None,
           as_json: AsJson = False) -> None:
    """Write a page that works offline: what was done, what was lost, what it costs, with pictures."""
    with _answers(as_json):
        from tsotsallm import api, console

        bar, show = console.step_bar(as_json)
        with bar:
            written = api.write_report(paths, out, reference=reference, text=text, tasks=task.split(",") if task else (),
                                 data=data, limit=limit, seed=seed, prompts=prompts, tokens=tokens, speed=speed,
                                 country=country, tick=show)
        if as_json:
            _print_json([str(path) for path in written])
            return
        print(written[0])
        print(f"{len(written) - 1} pictures beside it, in {out.stem}-pictures" if len(written) > 1 else "no pictures")


@app.command()
def worker(scheduler: Annotated[str, typer.Argument(help="Address of the scheduler, such as tcp://192.168.1.5:8786.")],
           memory: Annotated[str | None, typer.Option(help="What jobs may take, such as 4GB (default: most of what is "
                                                           "free).")] = None,
           threads: Annotated[int | None, typer.Option(help="Threads of a job (default: all).")] = None,
           work: Annotated[Path | None, typer.Option(help="Folder for models and results (default: in the cache).")] = None,
           name: Annotated[str | None, typer.Option(help="Name in the list of workers.")] = None,
           host: Annotated[str | None, typer.Option(help="Own address, where there are several.")] = None,
           tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None) -> None:
    """Let this computer do jobs of a cluster: studies, evaluations, generation."""
    with _answers():
        from tsotsallm.cluster.worker import parse_tls, run_worker
        from tsotsallm.machine import bytes_from_text

        run_worker(scheduler, work=work, memory=None if memory is None else bytes_from_text(memory, "--memory"),
                   threads=threads, name=name, host=host, tls=parse_tls(tls_ca, tls_cert, tls_key))


@app.command()
def serve(models: Annotated[list[str], typer.Argument(help="GGUF files, checkpoints, hub ids or 'embedded'; NAME=PATH names "
                                                           "one.")],
          port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8080,
          host: Annotated[str, typer.Option(help="Address to listen at; others than this computer's need --api-key.")] =
          "127.0.0.1",
          api_key: ApiKey = None, slots: Slots = 4, queue: Queue = 16, max_tokens: MaxTokens = 1024,
          timeout: Timeout = 300.0, max_body: MaxBody = "1MB", kv: Kv = "f16", prompt_cache: PromptCache = True,
          country: Country = None) -> None:
    """Serve models over HTTP: OpenAI's API, /process and /tokenize, and a page to talk on."""
    with _answers():
        from tsotsallm import api

        api.serve(models, port=port, host=host, key=api_key, slots=slots, queue=queue, max_tokens=max_tokens,
                  timeout_s=timeout, max_body=max_body, kv=kv, prompt_cache=prompt_cache, country=country)


@app.command()
def studio(folder: Annotated[Path, typer.Option(help="Folder with models, and for those that are made.")] = Path("."),
           models: Annotated[list[str] | None, typer.Argument(help="Models to talk to from the start.")] = None,
           port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8080,
           slots: Slots = 4, max_tokens: MaxTokens = 1024, country: Country = None) -> None:
    """Make models on a page in the browser: choose, see the plan, start, watch, stop, open the report, talk."""
    with _answers():
        from tsotsallm import api

        api.serve(models or [], port=port, slots=slots, max_tokens=max_tokens, country=country, studio=folder)


class _Bundles(TyperGroup):
    """`tsotsallm bundle MODEL` makes a bundle; verify looks at one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0] == "--help")
        return super().resolve_command(ctx, args if known else ["make", *args])


bundles = typer.Typer(cls=_Bundles, no_args_is_help=True, rich_markup_mode=None,
                      help="All that runs a model offline: `tsotsallm bundle MODEL -o FOLDER`; verify checks one.")
app.add_typer(bundles, name="bundle")


@bundles.command("make")
def bundle_make(models: Annotated[list[str], typer.Argument(help="GGUF files, folders of `fit`, or checkpoints.")],
                out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")],
                platform: Annotated[str | None, typer.Option(help="Such as linux-x86_64, linux-aarch64, windows-x86_64, "
                                                                  "macos-arm64 (default: as here).")] = None,
                python: Annotated[str | None, typer.Option(help="Version of Python there, such as 3.12.")] = None,
                index: Annotated[str | None, typer.Option(help="A further package index, such as torch's for CPUs.")] = None,
                as_json: AsJson = False) -> None:
    """Write wheels, models, page, scripts and checksums into a folder, for a USB stick."""
    with _answers(as_json):
        from tsotsallm import api
        from tsotsallm.machine import human_bytes

        found = api.make_bundle(models, out, platform=platform, python=python, index=index,
                                say=_to_stderr if as_json else print)
        _print_json(asdict(found)) if as_json else print(
            f"{found.path}: {len(found.models)} model{'s' * (len(found.models) > 1)}, {found.wheels} wheels, "
            f"{human_bytes(found.bytes)}")


@bundles.command("verify")
def bundle_verify(folder: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Check every file against its checksum."""
    with _answers():
        from tsotsallm import api

        print(f"{api.verify_bundle(folder)} files are as they were written")


@app.command()
def analyze(model: Model,
            out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the pictures and analysis.json.")],
            text: Annotated[Path | None, typer.Option(help="UTF-8 text to look at the model with.")] = None,
            reference: Annotated[str | None, typer.Option(help="The original, to draw beside it.")] = None,
            layers: Annotated[str | None, typer.Option(help="Layers, such as 0,7,-1 (default: first and last).")] = None,
            heads: Annotated[str | None, typer.Option(help="Heads, such as 0,1,2 (default: the first eight).")] = None,
            tokens: Annotated[int, typer.Option(help="Tokens of the text that are looked at.")] = 256,
            picture: Annotated[str, typer.Option(help="png or svg.")] = "png",
            device: Device = "cpu", scratch: Scratch = None, as_json: AsJson = False) -> None:
    """Look inside: attention maps and spectra, importance of layers, outliers; pictures and a JSON file."""
    with _answers(as_json):
        from tsotsallm import api, console
        from tsotsallm.errors import TsotsallmError

        if picture not in ("png", "svg"):
            raise TsotsallmError(f"--picture is {picture!r}; it takes png or svg")
        bar, show = console.step_bar(as_json)
        with bar:
            found = api.analyze(model, text, out, reference=reference, layers=_numbers(layers), heads=_numbers(heads),
                                tokens=tokens, picture=picture,  # type: ignore[arg-type]
                                device=device, scratch=scratch, tick=show)
        if as_json:
            _print_json(found.plain())
            return
        for path in found.files:
            print(path)


def _numbers(text: str | None) -> list[int] | None:
    from tsotsallm.errors import TsotsallmError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise TsotsallmError(f"{text!r} is not a list of numbers, such as 0,7,-1") from None


@app.command()
def franken(model: Model,
            text: Annotated[Path | None, typer.Option(help="UTF-8 text for perplexity and KL divergence.")] = None,
            task: Annotated[str | None, typer.Option(help="A task for the accuracy, such as hellaswag.")] = None,
            data: Annotated[Path | None, typer.Option(help="Data of the task.")] = None,
            limit: Annotated[int | None, typer.Option(help="So many windows and items.")] = None,
            seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
            device: Device = "cpu", scratch: Scratch = None, as_json: AsJson = False) -> None:
    """Run the 25 layer orders of FRANKEN-LLAMA on a model: skipped, repeated, reordered layers, side by side."""
    with _answers(as_json):
        from tsotsallm import api, console

        bar, show = console.step_bar(as_json)
        with bar:
            found = []
            for one in api.franken(model, text, task=task, data=data, limit=limit, seed=seed, device=device,
                                   scratch=scratch, tick=show):
                found.append(one)
                if not as_json:
                    bar.console.print(f"{one.name}: {one.completion!r}", markup=False, highlight=False)
        _print_json([one.plain() for one in found]) if as_json else console.print_orders(found)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the packaged evaluation tasks."""
    with _answers(as_json):
        from tsotsallm import console
        from tsotsallm.evaluation.tasks import packaged_tasks, read_task

        found = [read_task(name) for name in packaged_tasks()]
        if as_json:
            _print_json({task.name: task.plain() | {"about": task.about, "hub": dict(task.hub)} for task in found})
            return
        console.table("Tasks", ["task", "kind", "about"], [[task.name, task.kind, task.about] for task in found])


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the target devices, with what each has for a model."""
    with _answers(as_json):
        from tsotsallm import console
        from tsotsallm.evaluation import cost
        from tsotsallm.machine import human_bytes

        found = cost.devices()
        if as_json:
            _print_json(found)
            return
        console.table("Devices", ["device", "for weights and cache", "about", "source"],
                      [[name, human_bytes(facts["weight_bytes"]), facts["about"], facts["source"]]
                       for name, facts in found.items()])


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the packaged recipes."""
    with _answers(as_json):
        from tsotsallm.recipe import packaged_recipes

        texts = {name: file.read_text("utf-8") for name, file in packaged_recipes().items()}
        if as_json:
            _print_json(texts)
            return
        for name, text in texts.items():
            print(f"{name}\n" + "".join(f"    {line}\n" for line in text.splitlines()))


# -- tables -------------------------------------------------------------------------------------------------------------

tables_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Score annotated tables; write the embedded "
                                                                          "world's tables.")
app.add_typer(tables_app, name="tables")
Gold = Annotated[str | None, typer.Option(help="Folder with cea_gt.csv and the like, or of tables with X__URI columns, or "
                                               "'embedded'.")]


@app.command()
def annotate(tables: Annotated[list[str], typer.Argument(help="CSV files, folders of them, or 'embedded'.")],
             graph: Annotated[list[str], typer.Option(help="RDF or label file, or 'embedded'; may be given several times.")],
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
             model: Annotated[str | None, typer.Option(help="Model that decides where the graph is silent (default: the "
                                                            "graph alone).")] = None,
             tasks: Annotated[str, typer.Option(help="Of cea (cells), cta (columns), cpa (pairs of columns), with commas "
                                                     "between.")] = "cea,cta,cpa",
             gold: Gold = None,
             smaller_model: Annotated[str | None, typer.Option(help="For workers without the memory for --model: a smaller "
                                                                    "one, or 'none'.")] = None,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", as_json: AsJson = False) -> None:
    """Annotate tables with a knowledge graph: cells with entities, columns with types, pairs of columns with properties."""
    with _answers(as_json):
        from tsotsallm import api, console

        right = api.gold_tasks(gold) if gold is not None else ()        # refused before the work begins
        found = api.annotate(tables, graph, out, model=model, smaller_model=smaller_model,
                             tasks=[task.strip() for task in tasks.split(",") if task.strip()], device=device,
                             workers=_computers(workers, tls_ca, tls_cert, tls_key), say=_to_stderr)
        scored = [task for task in found.answers if task in right]
        scores = api.score_tables([out], gold, by_domain=True, tasks=scored) if gold is not None and scored else []
        if as_json:
            _print_json(found.plain() | ({"scores": [one.plain() for one in scores]} if scores else {}))
            return
        console.print_annotations(found)
        if scores:
            console.print_table_scores([str(out)], scores)


@tables_app.command("score")
def tables_score(submissions: Annotated[list[str], typer.Argument(help="Folders that `annotate` wrote; differences are to "
                                                                       "the first.")],
                 gold: Annotated[str, typer.Option(help="Folder with cea_gt.csv and the like, or of tables with X__URI "
                                                        "columns, or 'embedded'.")],
                 tasks: Annotated[str | None, typer.Option(help="Of cea, cta, cpa (default: all that the gold "
                                                                "has).")] = None,
                 as_json: AsJson = False) -> None:
    """Precision, recall and F1 as SemTab takes them, by domain, with paired intervals between submissions."""
    with _answers(as_json):
        from tsotsallm import api, console

        scores = api.score_tables(submissions, gold, by_domain=True, tasks=None if tasks is None else tasks.split(","))
        _print_json([one.plain() for one in scores]) if as_json else console.print_table_scores(submissions, scores)


@tables_app.command("world")
def tables_world(out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
                 count: Annotated[int, typer.Option(help="Tables.")] = 60,
                 seed: Annotated[int, typer.Option(help="Seed of the tables.")] = 0) -> None:
    """Write the embedded world's graph (Turtle), tables about it, and their gold."""
    with _answers():
        from tsotsallm import api

        print(api.write_world_tables(out, count=count, seed=seed))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
