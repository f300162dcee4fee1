"""`llm-engine`: the command line. One function a command; what they do is in the files beside it.

Importing this must stay light: everything but typer is imported by the command that needs it.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llm_engine.cli import batches, endpoint_commands, files, fine_tunes, keys
from llm_engine.cli.options import ApiKey, Config, Json, Url, connect
from llm_engine.errors import LLMEngineError

INTERRUPTED = 130


class Commands(TyperGroup):
    """An error that was raised on purpose is one sentence and exit code 1, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        from llm_engine.cli import console

        try:
            return super().invoke(ctx)
        except LLMEngineError as error:
            console.complain(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has enough
            sys.stdout = None  # type: ignore[assignment]
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="An LLM platform on Ray and vLLM: one OpenAI-compatible address for many models.",
    epilog="Start here:  llm-engine up   and in another terminal   llm-engine chat",
)
app.add_typer(endpoint_commands.app, name="endpoints")
app.add_typer(files.app, name="files")
app.add_typer(batches.app, name="batches")
app.add_typer(fine_tunes.app, name="fine-tunes")
app.add_typer(keys.app, name="keys")


def _version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example:  llm-engine up --model Qwen/Qwen3-0.6B --name qwen --port 9000")
def up(
    config: Config = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Serve just this one: a Hugging Face id, a folder, builtin:chat, builtin:embed.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call --model. Else its last part."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="In place of gateway.host.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="In place of gateway.port.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return once it is ready; it stays up.")
    ] = False,
) -> None:
    """Start everything on this machine: Ray, the gateway, the models.

    Stays in the foreground until Ctrl-C, which stops all of it in order.

    With no configuration it serves the models that come with llm-engine.

    Options given here win over the configuration.
    """
    import shlex

    from llm_engine.cli import target
    from llm_engine.cli import up as local

    settings = local.with_options(target.load_settings(config), model, name, host, port)
    hint = f" --config {shlex.quote(str(config))}" if config is not None else ""
    raise typer.Exit(local.up(settings, detach=detach, hint=hint))


@app.command(epilog="Example:  llm-engine up --detach; llm-engine down")
def down(config: Config = None) -> None:
    """Stop what `up` started. Harmless if nothing is up."""
    from llm_engine.cli import target
    from llm_engine.cli import up as local

    raise typer.Exit(local.down(target.load_settings(config).cluster.state_dir))


@app.command(epilog="Example:  llm-engine status --url http://10.0.0.5:8000 --json")
def status(
    json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """Show each endpoint: its state, replicas, load, and why it is not ready."""
    from llm_engine.cli import status as tables

    with connect(url, api_key, config) as gateway:
        tables.show_status(gateway, as_json=json)


@app.command(epilog="Example:  llm-engine models --json")
def models(
    json: Json = False, url: Url = None, api_key: ApiKey = None, config: Config = None
) -> None:
    """List the models that clients can name."""
    from llm_engine.cli import status as tables

    with connect(url, api_key, config) as gateway:
        tables.show_models(gateway, as_json=json)


@app.command(
    epilog="Examples:  llm-engine chat 'What is the capital of France?' --max-tokens 100\n\n"
    "cat question.txt | llm-engine chat"
)
def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The question. Without one: a conversation, or what a pipe brings."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Else the first endpoint that can chat."
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", metavar="T", min=0, max=2)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="Of the answer.")
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    config: Config = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D or /exit ends the conversation."""
    from llm_engine.cli import chat as talks

    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise LLMEngineError("there is no question: the pipe was empty.")
    limits = {"temperature": temperature, "max_completion_tokens": max_tokens}
    given = {key: value for key, value in limits.items() if value is not None}
    with connect(url, api_key, config) as gateway:
        model = model or talks.pick_model(gateway)
        talk = talks.Chat(gateway, model, system, given)
        if interactive:
            talks.converse(talk)
        else:
            talks.once(talk, prompt or "")


@app.command(name="config", epilog="Example:  llm-engine config --serve > serve.yaml")
def config_(
    config: Config = None,
    check: Annotated[
        bool, typer.Option("--check", help="Have vLLM judge vllm_args too; takes some seconds.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Print it as a Ray Serve file, for `serve deploy`.")
    ] = False,
) -> None:
    """Print the configuration that is in effect, with every default."""
    from llm_engine.cli import configuration, target

    settings = target.load_settings(config)
    if check:
        configuration.check(settings)
    if serve:
        configuration.show_serve(settings)
    elif not check:
        path = target.config_path(config)
        configuration.show(settings, str(path or "the built-in defaults"))


@app.command(name="ray-env", epilog='Example:  eval "$(llm-engine ray-env)"; ray status')
def ray_env(config: Config = None) -> None:
    """Print what a shell needs in order to talk to the Ray that `up` started."""
    import shlex

    from llm_engine.cli import target
    from llm_engine.cli.running import find_running, ray_environment

    folder = target.load_settings(config).cluster.state_dir
    running = find_running(folder)
    if running is None or running.ray is None:
        how = "is still starting" if running else "is not up"
        raise LLMEngineError(f"llm-engine {how} in {folder}, so there is no Ray to talk to.")
    for key, value in ray_environment(running, folder).items():
        print(f"export {key}={shlex.quote(value)}")


@app.command(epilog="Example:  llm-engine doctor --config llm-engine.yaml")
def doctor(json: Json = False, config: Config = None) -> None:
    """Check this installation and this machine, and say how to repair what is wrong."""
    from llm_engine.cli import doctor_table, target

    raise typer.Exit(doctor_table.show(lambda: target.load_settings(config), as_json=json))


@app.command(epilog="Example:  llm-engine version")
def version() -> None:
    """Show the versions of llm-engine and of what it stands on."""
    from llm_engine import __version__
    from llm_engine.cli.doctor_install import engine_build, installed

    parts = [f"{name} {installed(name)}" for name in ("ray", engine_build()) if name]
    python = ".".join(str(part) for part in sys.version_info[:3])
    print(f"llm-engine {__version__} ({', '.join(parts)}, Python {python})")


def main() -> None:
    app(prog_name="llm-engine")


if __name__ == "__main__":
    main()
