"""The command `balancer`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from balancer import __version__, config
from balancer.errors import BalancerError

_FLAGS = {
    "config": "FILE",
    "host": "ADDRESS",
    "port": "PORT",
    "metrics_port": "PORT",
    "admin_host": "ADDRESS",
    "admin_port": "PORT",
    "workers": "N",
    "redis": "URL",
    "log_level": "LEVEL",
    "data_dir": "FOLDER",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit status. Errors are one message on stderr, not a traceback."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()  # Here, where a reader that has left is expected, and not at the interpreter's exit.
        return status
    except BalancerError as exc:
        print(f"balancer: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough of it; what is still held goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="balancer", description="LLM load balancer whose whole fleet decides as one, through Redis."
    )
    parser.add_argument("--version", action="version", version=f"balancer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="run the gateway", description="Runs worker processes on one port.")
    _add_settings(serve, tuple(_FLAGS))
    serve.add_argument("--insecure", action="store_true", default=None, help=_meaning("insecure"))
    serve.add_argument("--lenient", action="store_true", help="mend what can be mended in --config, with warnings")
    serve.set_defaults(run=_serve)

    health = commands.add_parser(
        "healthcheck",
        help="ask the gateway of this machine whether it is alive",
        description="Exit 0 if the gateway that these settings describe answers /healthz. For HEALTHCHECK of an image.",
    )
    health.add_argument("--ready", action="store_true", help="ask /readyz instead: can it pick, and is not draining")
    _add_settings(health, ("host", "port"))
    health.set_defaults(run=_healthcheck)

    demo = commands.add_parser("demo", help="watch a fleet decide as one, and check it")
    demo.add_argument("--requests", type=int, default=3200, help="how many to send (at least 400; default 3200)")
    demo.add_argument("--workers", type=int, default=2, help="worker processes (default 2)")
    demo.add_argument("--concurrency", type=int, default=96, help="requests at once (default 96)")
    demo.add_argument("--break", dest="sabotage", action="store_true", help="with a wrong script: must end in exit 1")
    demo.add_argument("--keep", action="store_true", help="leave it running, with URLs to try")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="validate a configuration file")
    check.add_argument("file")
    check.add_argument("--lenient", action="store_true", help="mend what can be mended, with warnings")
    check.set_defaults(run=_configuration("check"))

    apply = commands.add_parser("apply", help="publish a configuration file to the fleet")
    apply.add_argument("file")
    apply.add_argument("--force", action="store_true", help="publish a file that was published before")
    apply.add_argument("--lenient", action="store_true", help="mend what can be mended, with warnings")
    apply.add_argument("--prune", action="store_true", help="take out what was made over the admin API")
    _add_settings(apply, ("redis", "data_dir"))
    apply.set_defaults(run=_configuration("apply"))

    diff = commands.add_parser("diff", help="show what `apply` would change; exit 1 if anything")
    diff.add_argument("file")
    diff.add_argument("--lenient", action="store_true", help="mend what can be mended, with warnings")
    diff.add_argument("--prune", action="store_true", help="take out what was made over the admin API")
    _add_settings(diff, ("redis", "data_dir"))
    diff.set_defaults(run=_configuration("diff"))

    get = commands.add_parser("get", help="print the configuration or counters as they stand")
    get.add_argument("what", choices=("rules", "providers", "configuration", "stats"))
    get.add_argument("--sealed", action="store_true", help="print sealed credentials as Redis has them, and not ***")
    get.add_argument("--output", choices=("yaml", "json"), default="yaml")
    _add_settings(get, ("redis", "data_dir"))
    get.set_defaults(run=_configuration("get"))

    audit = commands.add_parser("audit", help="check the recorded history against the reference")
    audit.add_argument("file", nargs="?", default="", help="a history that --save wrote; without one, the live pools")
    audit.add_argument("--pool", default="", metavar="NAME", help="this pool alone")
    audit.add_argument("--save", default="", metavar="FILE", help="write the live history to a file too")
    _add_settings(audit, ("redis", "data_dir"))
    audit.set_defaults(run=_audit)

    changes = commands.add_parser("changes", help="who changed what, the newest first")
    changes.add_argument("--limit", type=int, default=20, help="how many (default 20)")
    changes.add_argument("--before", default="", metavar="ID", help="those before the change with this id")
    changes.add_argument("--output", choices=("text", "json"), default="text")
    _add_settings(changes, ("redis", "data_dir"))
    changes.set_defaults(run=_changes)

    explain = commands.add_parser("explain", help="show which smart-routing entry a request matches, and why")
    explain.add_argument("--request", required=True, metavar="FILE", help="the request's JSON body; - reads stdin")
    explain.add_argument("--rule", default="", metavar="UUID", help="the rule; without it, the one for its model")
    explain.add_argument("--scenario", default="openai", metavar="NAME", help="where its model is looked up")
    explain.add_argument("--config", default="", metavar="FILE", help="a file, instead of what the fleet stands on")
    explain.add_argument("--output", choices=("text", "json"), default="text")
    _add_settings(explain, ("redis", "data_dir"))
    explain.set_defaults(run=_explain)

    import_ = commands.add_parser("import", help="make a configuration of another gateway's, with what it loses")
    import_.add_argument("source", choices=("litellm", "tingly"), help="whose configuration it is")
    import_.add_argument("file", help="its file; - reads stdin")
    import_.add_argument("--output", default="", metavar="FILE", help="write there instead of to stdout")
    import_.add_argument("--literals", action="store_true", help="keep literal credentials in what is written")
    import_.set_defaults(run=_import)

    models = commands.add_parser("models", help="fetch which models a provider offers")
    refresh = models.add_subparsers(title="actions", metavar="ACTION", required=True).add_parser(
        "refresh", help="fetch a provider's list, and publish it as its `models`"
    )
    refresh.add_argument("provider", help="its name or uuid")
    _add_settings(refresh, ("redis", "data_dir"))
    refresh.set_defaults(run=_refresh_models)

    secrets = commands.add_parser("secrets", help="look after the keys that seal credentials")
    rotate = secrets.add_subparsers(title="actions", metavar="ACTION", required=True).add_parser(
        "rotate", help="seal anew, with BALANCER_SECRET_KEY, all that another key has sealed"
    )
    _add_settings(rotate, ("redis", "data_dir"))
    rotate.set_defaults(run=_rotate_secrets)

    rollback = commands.add_parser("rollback", help="publish an earlier revision again, as a new one")
    rollback.add_argument("revision", type=int)
    _add_settings(rollback, ("redis", "data_dir"))
    rollback.set_defaults(run=_configuration("rollback"))
    return parser


def _meaning(name: str) -> str:
    return next(setting.meaning for setting in config.SETTINGS if setting.name == name)


def _add_settings(parser: argparse.ArgumentParser, names: tuple[str, ...]) -> None:
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=_FLAGS[name], help=_meaning(name))


def _serve(options: argparse.Namespace) -> int:
    # Before the imports, which take most of the start: the first process of a container has no default action, so that
    # a SIGTERM that nobody handles is lost, and the container lives on until it is killed at the end of its grace.
    signal.signal(signal.SIGTERM, _end_at_once)
    from balancer.cli import serve

    return serve.run(options)


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """While nothing is served yet there is nothing to drain; the exit status is that of a death by the signal."""
    raise SystemExit(128 + number)


def _healthcheck(options: argparse.Namespace) -> int:
    from balancer.cli import healthcheck

    return healthcheck.run(options)


def _demo(options: argparse.Namespace) -> int:
    from balancer.cli import demo

    return demo.run(options)


def _explain(options: argparse.Namespace) -> int:
    from balancer.cli import explaining

    return explaining.run(options)


def _refresh_models(options: argparse.Namespace) -> int:
    from balancer.cli import models

    return models.refresh(options)


def _rotate_secrets(options: argparse.Namespace) -> int:
    from balancer.cli import sealing

    return sealing.rotate(options)


def _import(options: argparse.Namespace) -> int:
    from balancer.cli import importing

    return importing.run(options)


def _audit(options: argparse.Namespace) -> int:
    from balancer.cli import audit

    return audit.run(options)


def _changes(options: argparse.Namespace) -> int:
    from balancer.cli import changes

    return changes.run(options)


def _configuration(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from balancer.cli import configuration

        return int(getattr(configuration, name)(options))

    return run


if __name__ == "__main__":
    raise SystemExit(main())
